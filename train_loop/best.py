"""Which evaluation was the best, whether patience has run out, and the best weights at the end.

The best evaluation so far and the number of evaluations that did not beat it are part of `Position`, and so of each
checkpoint. They follow from the validation loss, which is the same number on every process, so all processes decide
alike. The evaluation of the untrained model, at step 0, does not count.
"""

import math
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from train_loop.checkpoint import Checkpoints, damage, load_weights, name_of
from train_loop.errors import num_of, tell
from train_loop.position import Position
from train_loop.settings import Settings


def evaluation_is_due(position: Position, last_step: int, settings: Settings) -> bool:
    """Whether an evaluation is due at `position` and was not made yet. The last step is always evaluated."""
    step, every = position.step, settings.eval_steps
    due = step == 0 or (step % every == 0 if every else position.ends_epoch())
    too_early = (step if every else position.in_epochs()) < settings.eval_delay
    return (step == last_step or (due and not too_early)) and position.evaluated_step != step


def take_evaluation(position: Position, evaluation: dict[str, Any], settings: Settings) -> None:
    """Records in `position` the evaluation that was made there. Its `eval_loss` is finite."""
    position.evaluated_step, position.evaluation = position.step, evaluation
    if position.step == 0:
        return
    gain = (position.best["eval_loss"] if position.best else math.inf) - evaluation["eval_loss"]
    position.num_worse = 0 if gain > settings.early_stopping_threshold else position.num_worse + 1
    if gain > 0:
        position.best_step, position.best = position.step, evaluation


def last_step(position: Position, num_steps: int, settings: Settings) -> int:
    """The step at which the run ends: the present one if patience has run out, else `num_steps`."""
    patience = settings.early_stopping_patience
    return position.step if patience and position.num_worse >= patience else num_steps


def say_why_it_ended(position: Position, num_steps: int) -> str:
    """The message of a run that stopped early."""
    best = f" (best: {position.best['eval_loss']:.4f} at step {position.best_step:,})" if position.best else ""
    return (
        f"stopped early after step {position.step:,} of {num_steps:,}: the last "
        f"{num_of(position.num_worse, 'evaluation')} did not lower the validation loss{best}"
    )


def load_best(checkpoints: Checkpoints, position: Position, model: torch.nn.Module) -> tuple[int, dict[str, Any]]:
    """Loads the weights to export into `model` and returns their (step, evaluation): the best ones if asked for and not
    damaged, else the last. Call it on every process."""
    assert position.evaluation is not None  # the last step is always evaluated
    last = position.step, position.evaluation
    if not checkpoints.settings.load_best_model_at_end or position.best_step == position.step:
        return last
    is_main, problem = checkpoints.accelerator.is_main_process, "there is no best model"
    path = checkpoints.folder / name_of(position.best_step or 0)
    if position.best:
        reason = broadcast_object_list([damage(path) if is_main else None])[0]
        problem = reason and f"the best checkpoint, {path}, is damaged ({reason})"
    if problem or position.best_step is None or position.best is None:
        if is_main:
            tell(f"{problem}: the model of the last step is exported")
        return last
    load_weights(path, checkpoints.accelerator.unwrap_model(model))
    return position.best_step, position.best
