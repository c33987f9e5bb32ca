"""The loop. Everything that changes a weight happens here, in the order in which it is written.

W: processes, M: micro-batches of a window (one optimizer step, on one process), B: blocks of a micro-batch, T: tokens
of a block. The loss of an optimizer step is the sum of -log p over every target token of its W x M x B blocks, divided
by the number of those targets: how the blocks are spread over micro-batches and processes does not show.
"""

import contextlib
import math

import torch

from train_loop import best
from train_loop.evaluate import evaluate
from train_loop.finite import FiniteGuard
from train_loop.loss import count_targets, next_token_loss
from train_loop.sharded import whole
from train_loop.stop import Stopped


def steps_per_epoch(num_blocks, settings, world_size):
    """Optimizer steps in one pass over the training blocks; the last may be a short one. None for a stream's blocks
    (None), which are not counted."""
    blocks_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world_size
    return num_blocks and math.ceil(num_blocks / blocks_per_step)


def num_steps(num_blocks, settings, world_size):
    """Optimizer steps of the whole run."""
    return settings.max_train_steps or math.ceil(
        settings.num_train_epochs * steps_per_epoch(num_blocks, settings, world_size)
    )


def train(
    model,
    optimizer,
    scheduler,
    train_split,
    eval_split,
    settings,
    accelerator,
    metrics,
    checkpoints,
    stop,
    position,
    publisher=None,
    samples=None,
):
    """Trains `model` in place, from `position` on. `model` and `optimizer` are prepared by Accelerate, `scheduler` is
    not. A `publisher` is told of each checkpoint; `samples` are written with each evaluation.
    Returns the last evaluation.

    Raises, on all processes alike: FloatingPointError, before the weights are touched, when a loss or a gradient norm
    is not finite; Stopped, with a checkpoint written, when `stop` came.
    """
    W, device = accelerator.num_processes, accelerator.device
    all_steps = num_steps(train_split.num_blocks, settings, W)
    last_step = best.last_step(position, all_steps, settings)
    position.per_epoch = steps_per_epoch(train_split.num_blocks, settings, W) or position.per_epoch

    finite = FiniteGuard(optimizer, accelerator, checkpoints)

    def log_training():
        finite.look()
        metrics.log_training()

    def evaluate_if_due():
        nonlocal last_step
        step, every = position.step, settings.eval_steps
        due = step in (0, last_step) or (step % every == 0 if every else position.ends_epoch())
        if not due or position.evaluated_step == step:
            return
        log_training()
        evaluation = evaluate(model, eval_split, settings, accelerator, metrics.show_progress, stop)
        if evaluation is not None:  # it was not stopped
            last_step = best.take_evaluation(position, evaluation, all_steps, settings)
            written = samples and samples.write(model, device)
            metrics.log_evaluation(step, position.in_epochs(), evaluation, written)

    evaluate_if_due()  # of the untrained model; or the one that a stop cut short
    model.train()
    while position.step < last_step and not stop.agreed(accelerator):
        for window in train_split.windows(settings, accelerator, position):  # the rest of the epoch's
            window = {name: value.to(device, non_blocking=True) for name, value in window.items()}  # each [M, B, T]
            num_targets = accelerator.reduce(count_targets(window["labels"]), "sum")

            sums = {}  # over the window's targets: nats, and whatever else the loss wants logged
            num_micro_batches = len(window["labels"])
            for i in range(num_micro_batches):
                # gradients are summed up here, and exchanged between processes with the last micro-batch only
                with accelerator.no_sync(model) if i < num_micro_batches - 1 else contextlib.nullcontext():
                    nll, _, extras = next_token_loss(model, {name: value[i] for name, value in window.items()})
                    accelerator.backward(nll * W / num_targets)  # x W: the exchange averages over processes
                for name, value in {"loss": nll.detach(), **extras}.items():
                    sums[name] = sums.get(name, 0) + value

            grad_norm = whole(accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf))
            sums = accelerator.reduce(sums, "sum")
            finite.check(position.step + 1, sums["loss"], grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            position.window += 1
            if accelerator.scaler is None or torch.isfinite(grad_norm):
                learning_rate = scheduler.get_last_lr()[0]
                scheduler.step()
                position.step += 1
                metrics.count_step(position.step, position.in_epochs(), sums, num_targets, learning_rate, grad_norm)
                if position.step % settings.logging_steps == 0:
                    log_training()
            else:  # float16's scaler met an overflow: it kept the weights as they were, and halved its scale
                metrics.count_skipped_step()

            evaluate_if_due()
            stopping = stop.agreed(accelerator)
            if stopping or checkpoints.is_due(position, last_step):
                finite.look()
                checkpoints.save(position, model, optimizer, metrics)
                if publisher and not stopping and position.step < last_step:
                    publisher.push_checkpoint(checkpoints.latest, position.step, model, metrics)
            if stopping or position.step == last_step:
                break
        if position.ends_epoch():
            position.epoch, position.window = position.epoch + 1, 0
    if stop.number and (position.step < last_step or position.evaluated_step != position.step):
        raise Stopped(f"after step {position.step} of {last_step}; {checkpoints.say_latest()}")
    return position.evaluation
