"""The signal that asks a run to stop, and the launcher, without which a run ends. Imports nothing heavy, so that both
are watched from the start."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from train_loop.process.clock import Clock


class Stopped(BaseException):
    """The run ends early because it was asked to. The message says how far it came. `checkpoint`: the folder to resume
    from, or None."""

    def __init__(self, message: str = "", checkpoint: Path | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP as a request, which the loop checks after each step and during evaluation.

    Until `deferred` is set there is nothing to save, and the signal raises `Stopped` at once. With several processes
    the system ends the process then: a process that waits in C code for its peers runs no handler, and the launcher
    would wait half a minute for it. A second Ctrl-C always raises `Stopped`. Within one second of the first it counts
    as the same one, because a terminal and a launcher may both send it. A SIGHUP that was ignored (nohup) stays
    ignored.
    """

    # Windows lacks the last two
    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))

    def __enter__(self) -> StopSignal:
        self.number, self.since, self.deferred = 0, 0.0, False
        self.began = time.monotonic()  # close to the start of the process
        self.group: torch.distributed.ProcessGroup | None = None
        self.timeout = 0.0  # seconds that a process waits for its peers
        listened = [n for n in self.SIGNALS if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]
        handler = signal.SIG_DFL if int(os.environ.get("WORLD_SIZE", 1)) > 1 else self._receive
        self.previous = {number: signal.signal(number, handler) for number in listened}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        again = number == self.number == signal.SIGINT and time.monotonic() - self.since > 1
        if not self.number:
            self.number, self.since = number, time.monotonic()
        if again or not self.deferred:
            raise Stopped("" if self.deferred else "before there was anything to save")

    def defer(self, timeout: float) -> None:
        """From now on a signal waits until the loop checks it. `timeout`: seconds that a process waits for its
        peers."""
        self.deferred, self.timeout = True, timeout
        for number in self.previous:
            signal.signal(number, self._receive)
        end_with_launcher(signal.SIGTERM)  # from now on there is something to save

    def agreed(self, accelerator: Accelerator, clock: Clock | None = None) -> bool:
        """Whether any process was asked to stop: the same answer on all processes. The decision of the main process's
        `clock` is sent along."""
        if accelerator.num_processes == 1:
            return bool(self.number)
        import torch

        if self.group is None and accelerator.device.type != "cpu":
            # the processes agree on the host: on the device each step would wait for the answer
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        by_clock = [clock.save_is_due, clock.is_over] if clock and accelerator.is_main_process else [False, False]
        says = torch.tensor([bool(self.number), *by_clock], dtype=torch.int64)
        torch.distributed.all_reduce(says, group=self.group)  # on a CPU the default group is gloo already
        asked, *by_clock = says.bool().tolist()
        if clock:
            clock.save_is_due, clock.is_over = by_clock
        if asked:
            self.number = self.number or signal.SIGTERM
        return bool(self.number)

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else ""


# `accelerate launch` sets all of these for every process that it starts
ACCELERATE = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"}


def end_with_launcher(number: int) -> None:
    """Asks Linux to send this process the signal `number` when its launcher dies. If the launcher is already dead, the
    process gets a SIGTERM now. Without a launcher this does nothing.

    Before there is anything to save the signal is SIGKILL: a process that waits for its peers in C code reacts to no
    other.
    """
    is_launched = os.environ.keys() >= ACCELERATE or "TORCHELASTIC_RUN_ID" in os.environ  # the latter by torchrun
    if sys.platform != "linux" or not is_launched:
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)
    if is_orphan():  # the launcher died before the line above
        os.kill(os.getpid(), signal.SIGTERM)


def is_orphan() -> bool:
    """Whether the parent of this process is one that adopts orphans: the system's first process, or systemd. In a
    container the first process may be the launcher itself, which is a Python."""
    parent = os.getppid()
    try:
        name = Path(Path(f"/proc/{parent}/cmdline").read_text(errors="replace").split("\0")[0]).name
    except OSError:  # there is no /proc
        return False
    return (parent == 1 or name == "systemd") and "python" not in name
