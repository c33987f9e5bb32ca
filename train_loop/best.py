"""Which evaluation was the best, when patience has run out, and the way back to the best weights.

The best so far and the count of evaluations that did not beat it are part of `Position`, and so of each checkpoint.
They follow from the validation loss, which is the same number on every process: all of them decide alike. The
evaluation of the untrained model, at step 0, takes no part.
"""

import math

from accelerate.utils import broadcast_object_list

from train_loop.checkpoint import damage, load_weights, name_of
from train_loop.errors import tell


def take_evaluation(position, evaluation, num_steps, settings):
    """Takes note of the evaluation at `position`, and returns the step at which the run ends, as far as is known now.
    A loss that is not finite is never the best."""
    position.evaluated_step, position.evaluation = position.step, evaluation
    if position.step == 0:
        return num_steps
    gain = (position.best["eval_loss"] if position.best else math.inf) - evaluation["eval_loss"]
    is_finite = math.isfinite(evaluation["eval_loss"])
    position.num_worse = 0 if is_finite and gain > settings.early_stopping_threshold else position.num_worse + 1
    if is_finite and gain > 0:
        position.best_step, position.best = position.step, evaluation
    return last_step(position, num_steps, settings)


def last_step(position, num_steps, settings):
    """The step at which the run ends: here, if patience has run out, else after all of its steps."""
    patience = settings.early_stopping_patience
    return position.step if patience and position.num_worse >= patience else num_steps


def say_why_it_ended(position, num_steps):
    """A sentence about a run that stopped early."""
    best = f"{position.best['eval_loss']:.4f} at step {position.best_step:,}" if position.best else "never finite"
    return (
        f"stopped early after step {position.step:,} of {num_steps:,}: the last {position.num_worse} evaluations did "
        f"not lower the validation loss (best: {best})"
    )


def load_best(checkpoints, position, model):
    """(step, evaluation) of the weights that are to be exported, which are in `model` then: the best, if that is asked
    for and they are whole, else the last. Called on every process."""
    last = position.step, position.evaluation
    if not checkpoints.settings.load_best_model_at_end or position.best_step == position.step:
        return last
    is_main, problem = checkpoints.accelerator.is_main_process, "there is no best model"
    path = checkpoints.folder / name_of(position.best_step or 0)
    if position.best:
        reason = broadcast_object_list([damage(path) if is_main else None])[0]
        problem = reason and f"the best, {path}, is damaged ({reason})"
    if problem:
        if is_main:
            tell(f"{problem}: the model of the last step is exported")
        return last
    load_weights(path, checkpoints.accelerator.unwrap_model(model))
    return position.best_step, position.best
