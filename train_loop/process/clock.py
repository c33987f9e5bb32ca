"""When a checkpoint, or the end of the run, is due by the clock."""

import time
from collections.abc import Callable


class Clock:
    """Counts `save_minutes` from the last checkpoint and `max_minutes` from `began`; None: never due.

    Every process has one. Clocks differ, so the clock of the main process decides: `StopSignal.agreed` sends its
    decision to the others. `now` returns seconds, as `time.monotonic` does.
    """

    def __init__(
        self,
        save_minutes: float | None = None,
        max_minutes: float | None = None,
        began: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.save_minutes, self.max_minutes, self.now = save_minutes, max_minutes, now
        self.began = now() if began is None else began
        self.saved = now()  # time of the last checkpoint; before the first one: of this object
        self.first_step: int | None = None  # the first step for which `look` was called
        self.save_is_due = self.is_over = False

    def look(self, step: int) -> "Clock":
        """Sets `save_is_due` and `is_over` at `step`. A run makes at least one step, however little time it has. So the
        same command, given again and again, reaches the end."""
        if self.first_step is None:
            self.first_step = step
        now = self.now()
        self.save_is_due = self.save_minutes is not None and now - self.saved >= 60 * self.save_minutes
        time_is_up = self.max_minutes is not None and now - self.began >= 60 * self.max_minutes
        self.is_over = time_is_up and step > self.first_step
        return self

    def restart(self) -> None:
        """Call it when a checkpoint was made."""
        self.saved = self.now()

    def say(self, step: int, num_steps: int) -> str:
        """The message of a run whose time is up: how far it came."""
        return (
            f"stopped after {self.max_minutes:g} minutes (max_minutes) at step {step:,} of {num_steps:,}. To train the "
            "rest: the same command with --resume_from_checkpoint auto"
        )
