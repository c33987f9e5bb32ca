"""The loop. Everything that changes a weight happens here, in the order in which it is written.

W: processes, M: micro-batches of a window (one optimizer step, on one process), B: blocks of a micro-batch, T: tokens
of a block. The loss of an optimizer step is the sum of -log p over every target token of its W x M x B blocks, divided
by the number of those targets: how the blocks are spread over micro-batches and processes does not show.
"""

import contextlib
import math

import torch

from train_loop import best
from train_loop.checkpoint import unsharded
from train_loop.evaluate import evaluate
from train_loop.finite import FiniteGuard
from train_loop.loss import count_targets, next_token_loss
from train_loop.stop import Stopped


def steps_per_epoch(num_blocks, settings, world_size):
    """Optimizer steps in one pass over the training blocks; the last may be a short one. None for a stream's blocks
    (None), which are not counted."""
    return num_blocks and math.ceil(num_blocks / settings.blocks_per_step(world_size))


def num_steps(num_blocks, settings, world_size):
    """Optimizer steps of the whole run."""
    return settings.max_train_steps or math.ceil(
        settings.num_train_epochs * steps_per_epoch(num_blocks, settings, world_size)
    )


def train(
    model,
    optimizer,
    scheduler,
    position,
    train_split,
    eval_split,
    settings,
    accelerator,
    metrics,
    checkpoints,
    stop,
    publisher=None,
    samples=None,
):
    """Trains `model` in place, from `position` on, which moves along. `model` and `optimizer` come from Accelerate's
    `prepare`, `scheduler` does not. A `publisher` is told of each checkpoint; `samples` are written at each evaluation.

    Raises, on all processes alike: UserError, before the weights are touched, when a loss or a gradient norm
    is not finite; Stopped, with a checkpoint written, when `stop` came.
    """
    W, device = accelerator.num_processes, accelerator.device
    all_steps = num_steps(train_split.num_blocks, settings, W)
    first_step, last_step = position.step, best.last_step(position, all_steps, settings)
    position.per_epoch = steps_per_epoch(train_split.num_blocks, settings, W) or position.per_epoch
    windows = windows_from(position, train_split, settings, accelerator)
    finite = FiniteGuard(optimizer, accelerator, checkpoints)
    model.train()

    while True:
        # where it is due: the validation loss; of the untrained model too, and the one that a stop cut short
        if evaluation_is_due(position, last_step, settings):
            finite.look()
            metrics.log_training()
            evaluation = evaluate(model, eval_split, settings, accelerator, metrics.show_progress, stop)
            if evaluation is not None:  # it was not stopped
                last_step = best.take_evaluation(position, evaluation, all_steps, settings)
                written = samples and samples.write(model, device)
                metrics.log_evaluation(position.step, position.in_epochs(), evaluation, written)

        # where it is due, and before the run stops: a checkpoint
        stopping = stop.agreed(accelerator)
        if position.step > first_step and (stopping or checkpoints.is_due(position, last_step)):
            finite.look()
            checkpoints.save(position, model, optimizer, metrics)
            if publisher and not stopping and position.step < last_step:
                publisher.push_checkpoint(checkpoints.latest, position.step, model, metrics)
        if stopping or position.step == last_step:
            break

        # one optimizer step: forward and backward passes over a window, whose targets are counted first
        window = {name: value.to(device, non_blocking=True) for name, value in next(windows).items()}  # each [M, B, T]
        num_targets = accelerator.reduce(count_targets(window["labels"]), "sum")  # of all processes
        sums = {}  # over the window's targets: nats, and whatever else the loss wants logged
        num_micro_batches = len(window["labels"])
        for i in range(num_micro_batches):
            # gradients are summed up here, and exchanged between processes with the last micro-batch only
            is_last = i == num_micro_batches - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                micro_batch = {name: value[i] for name, value in window.items()} | for_objective(position, settings)
                nll, _, extras = next_token_loss(model, micro_batch)
                accelerator.backward(nll * W / num_targets)  # x W: the exchange averages over processes
            for name, value in {"loss": nll.detach(), **extras}.items():
                sums[name] = sums.get(name, 0) + value

        grad_norm = unsharded(accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf))
        sums = accelerator.reduce(sums, "sum")
        finite.check(position.step + 1, sums["loss"], grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        position.window += 1
        if accelerator.scaler is not None and not torch.isfinite(grad_norm):
            # float16's scaler met an overflow: it kept the weights as they were, and halved its scale
            metrics.count_skipped_step()
            continue
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        position.step += 1
        metrics.count_step(position.step, position.in_epochs(), sums, num_targets, learning_rate, grad_norm)
        if position.step % settings.logging_steps == 0:
            finite.look()
            metrics.log_training()

    if stop.number and (position.step < last_step or position.evaluated_step != position.step):
        raise Stopped(f"after step {position.step} of {last_step}; {checkpoints.say_latest()}")


def windows_from(position, split, settings, accelerator):
    """This process's windows from `position` on, epoch after epoch, without end: {"input_ids", "labels", ...} each."""
    while True:
        yield from split.windows(settings, accelerator, position)  # the rest of the epoch's
        position.epoch, position.window = position.epoch + 1, 0


def for_objective(position, settings):
    """What the objective gets by name in training, beside what belongs to its rows (`loss.py`). `step`: those taken."""
    return {"step": position.step, "label_smoothing": settings.label_smoothing_factor}


def evaluation_is_due(position, last_step, settings):
    """Whether an evaluation belongs here, and was not made yet."""
    step, every = position.step, settings.eval_steps
    due = step in (0, last_step) or (step % every == 0 if every else position.ends_epoch())
    return due and position.evaluated_step != step
