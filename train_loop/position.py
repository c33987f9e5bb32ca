"""Where a run is. It goes into each checkpoint as JSON, so every field is a number, a text, or a dict of these.

A number of your own that must survive a resume becomes a field of `Position`, with a default. A tensor of your own goes
into `optimizer.state[parameter][name]`, which a checkpoint keeps as well.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from train_loop.errors import UserError, tell


@dataclass
class Place:
    """Where in the training data a run is: the first `window` windows of `epoch` are done."""

    epoch: int = 0
    window: int = 0
    per_epoch: int | None = None  # windows of an epoch; None in a stream's first epoch, until its end is reached
    stream: dict[str, Any] | None = None  # where the next window of a stream begins, see `data/streaming.py`


@dataclass
class Position(Place):
    """How far a run is: its place in the data, and `step` optimizer steps in all."""

    step: int = 0
    evaluated_step: int | None = None  # the step of the last evaluation, and its numbers
    evaluation: dict[str, Any] | None = None
    best_step: int | None = None  # the step of the evaluation with the lowest loss, and its numbers (`best.py`)
    best: dict[str, Any] | None = None
    num_worse: int = 0  # evaluations in a row that did not beat the best

    @classmethod
    def from_dict(cls, values: dict[str, Any], is_main: bool = True) -> "Position":
        """The position that a checkpoint holds. A field that is newer than the checkpoint gets its default, and the
        main process says so. Raises UserError if the checkpoint holds a field that is missing here: its value would be
        lost."""
        fields = {f.name: f.default for f in dataclasses.fields(cls)}
        if gone := sorted(values.keys() - fields.keys()):
            raise UserError(
                f"the checkpoint's position holds {', '.join(gone)}, but Position has no such field: put it back into "
                "train_loop/position.py to resume from this checkpoint"
            )
        for name in fields.keys() - values.keys() if is_main else ():
            tell(f"the checkpoint's position does not hold {name}: it begins with {fields[name]}")
        return cls(**values)

    def move_to(self, place: Place) -> None:
        """Moves to `place` in the data."""
        for f in dataclasses.fields(Place):
            setattr(self, f.name, getattr(place, f.name))

    def ends_epoch(self) -> bool:
        return self.window == self.per_epoch

    def in_epochs(self) -> float:
        """Epochs done; only complete ones count while the length of an epoch is unknown."""
        return self.epoch + (self.window / self.per_epoch if self.per_epoch else 0.0)
