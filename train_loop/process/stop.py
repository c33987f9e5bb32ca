"""The signal that asks a run to stop, and the launcher that it must not outlive. Imports nothing heavy: both are
watched from the beginning."""

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
    """The run ends early because it was asked to. The argument says how far it came. `checkpoint` is the folder to
    resume from, None where there is none."""

    def __init__(self, message: str = "", checkpoint: Path | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP as a wish that the loop looks at after each step and in evaluation.

    Until `deferred` is set there is nothing to save, and the signal raises `Stopped` at once. A second Ctrl-C always
    does; within a second of the first it counts as the same one, which a launcher passes on beside the terminal.
    One of several processes is then ended by the system itself: a process that waits in C code for its peers to join
    runs no handler, and the launcher would wait for it half a minute.
    A SIGHUP that was ignored (nohup) stays ignored.
    """

    # Windows lacks the last two
    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))

    def __enter__(self) -> StopSignal:
        self.number, self.since, self.deferred = 0, 0.0, False
        self.began = time.monotonic()  # nearly when the process did
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
        """From now on a signal waits until it is looked at. `timeout`: seconds that a process waits for its peers."""
        self.deferred, self.timeout = True, timeout
        for number in self.previous:
            signal.signal(number, self._receive)
        end_with_launcher(signal.SIGTERM)  # from now on there is something to save

    def agreed(self, accelerator: Accelerator, clock: Clock | None = None) -> bool:
        """Whether any process was asked to stop: the same answer on all of them. What the main process's `clock` says
        goes to the others with it."""
        if accelerator.num_processes == 1:
            return bool(self.number)
        import torch

        if self.group is None and accelerator.device.type != "cpu":
            # processes agree on the host: on the device, each step would have to wait for it
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        by_clock = [clock.save_is_due, clock.is_over] if clock and accelerator.is_main_process else [False, False]
        says = torch.tensor([bool(self.number), *by_clock], dtype=torch.int64)
        torch.distributed.all_reduce(says, group=self.group)  # on a CPU the default group is one of the host
        asked, *by_clock = says.bool().tolist()
        if clock:
            clock.save_is_due, clock.is_over = by_clock
        if asked:
            self.number = self.number or signal.SIGTERM
        return bool(self.number)

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else ""


# what `accelerate launch` gives to every process that it starts; by hand nobody sets all of them
ACCELERATE = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"}


def end_with_launcher(number: int) -> None:
    """Asks Linux to send this process the signal `number` when the launcher that started it dies; a launcher that is
    gone already counts as a SIGTERM now. Without a launcher it does nothing.

    Before there is anything to save the signal is SIGKILL: a process that waits for its peers in C code answers to no
    other one.
    """
    is_launched = os.environ.keys() >= ACCELERATE or "TORCHELASTIC_RUN_ID" in os.environ  # the latter by torchrun
    if sys.platform != "linux" or not is_launched:
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)
    if is_orphan():  # the launcher died before the line above
        os.kill(os.getpid(), signal.SIGTERM)


def is_orphan() -> bool:
    """Whether the parent of this process is one that takes in orphans: the system's first process, or systemd. In a
    container the first process may be the launcher itself, a Python."""
    parent = os.getppid()
    try:
        name = Path(Path(f"/proc/{parent}/cmdline").read_text(errors="replace").split("\0")[0]).name
    except OSError:  # there is no /proc
        return False
    return (parent == 1 or name == "systemd") and "python" not in name
