"""Where a run is. It goes into each checkpoint as it stands, as JSON."""

from dataclasses import dataclass


@dataclass
class Position:
    """How far a run is: `window` optimizer steps' blocks of `epoch` are done, and `step` optimizer steps in all."""

    epoch: int = 0
    window: int = 0
    step: int = 0
    evaluated_step: int | None = None  # the step of the last evaluation, and what came out
    evaluation: dict | None = None
    best_step: int | None = None  # of the lowest validation loss, and that evaluation; kept by `best.py`
    best: dict | None = None
    num_worse: int = 0  # evaluations in a row that did not beat the best
    per_epoch: int | None = None  # windows of an epoch; None until a stream has come to its end
    stream: dict | None = None  # where the next window of a stream begins, see `streaming.Stream`

    def ends_epoch(self):
        return self.window == self.per_epoch

    def in_epochs(self):
        """Epochs done, a float; whole ones alone while nobody knows how long an epoch is."""
        return self.epoch + (self.window / self.per_epoch if self.per_epoch else 0.0)
