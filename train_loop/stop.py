"""The signal that asks a run to stop. Imports nothing heavy: it is listened to from the beginning."""

import signal
import time
from datetime import timedelta


class Stopped(BaseException):
    """The run ends early because it was asked to; the argument says what there is to resume from, "" if nothing."""


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 as a wish that the loop looks at after each step and in evaluation.

    Until `deferred` is set there is nothing to save, and the signal raises `Stopped` at once. A second Ctrl-C always
    does; within a second of the first it counts as the same one, which a launcher passes on beside the terminal.
    """

    # Windows lacks the last one
    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __enter__(self):
        self.number, self.since, self.deferred = 0, 0.0, False
        self.group, self.timeout = None, None
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

    def defer(self, timeout):
        """From now on a signal waits until it is looked at. `timeout`: seconds that a process waits for its peers."""
        self.deferred, self.timeout = True, timeout

    def agreed(self, accelerator):
        """Whether any process was asked to stop: the same answer on all of them."""
        if accelerator.num_processes == 1:
            return bool(self.number)
        import torch

        if self.group is None and accelerator.device.type != "cpu":
            # processes agree on the host: on the device, each step would have to wait for it
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        asked = torch.tensor(int(bool(self.number)))
        torch.distributed.all_reduce(asked, group=self.group)  # on a CPU the default group is one of the host
        if asked:
            self.number = self.number or signal.SIGTERM
        return bool(self.number)

    @property
    def name(self):
        return signal.Signals(self.number).name if self.number else ""
