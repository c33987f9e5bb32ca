"""Compares runs, and says whether one is better: `python -m train_loop.compare`, which is __main__.py.

command.py   what the command prints            differences.py   which loss is lower, in words and in a table
runs.py      folders of runs, and their recipes intervals.py     how sure a difference is
settings_table.py   what the runs did differently       picture.py       comparison.png
"""

from train_loop.compare.command import main
from train_loop.compare.intervals import Difference, difference

__all__ = ["Difference", "difference", "main"]
