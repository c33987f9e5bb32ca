"""This process and its environment: signals, the console, which code runs. Nothing heavy is imported.

stop.py     the signal that asks a run to stop      console.py  a console that never stops a run
version.py  which version of the code runs          clock.py    saves, and the end of a run, by the clock
"""

from train_loop.process.clock import Clock
from train_loop.process.console import printable, safe_console
from train_loop.process.stop import Stopped, StopSignal, end_with_launcher
from train_loop.process.version import code_version

__all__ = ["Clock", "StopSignal", "Stopped", "code_version", "end_with_launcher", "printable", "safe_console"]
