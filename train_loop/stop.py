"""The signal that asks a run to stop. Imports nothing heavy: it is listened to from the beginning."""

import signal
import time


class Stopped(BaseException):
    """The run ends early because it was asked to; the argument says what there is to resume from, "" if nothing."""


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 as a wish that the loop looks at after each step and in evaluation.

    Until `deferred` is set there is nothing to save, and the signal raises `Stopped` at once. A second Ctrl-C always
    does; within a second of the first it counts as the same one, which a launcher passes on beside the terminal.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __enter__(self):
        self.number, self.since, self.deferred = 0, 0.0, False
        self.previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        again = number == self.number == signal.SIGINT and time.monotonic() - self.since > 1
        if not self.number:
            self.number, self.since = number, time.monotonic()
        if again or not self.deferred:
            raise Stopped("")

    def agreed(self, accelerator):
        """Whether any process was asked to stop: the same answer on all of them."""
        if accelerator.num_processes == 1:
            return bool(self.number)
        import torch

        if accelerator.reduce(torch.tensor(bool(self.number), device=accelerator.device).int(), "sum"):
            self.number = self.number or signal.SIGTERM
        return bool(self.number)

    @property
    def name(self):
        return signal.Signals(self.number).name if self.number else ""
