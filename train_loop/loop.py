"""The loop. Everything that changes a weight happens here, in the order in which it is written.

W: processes, M: micro-batches of a window (one optimizer step, on one process), B: blocks of a micro-batch, T: tokens
of a block. The loss of an optimizer step is the sum of -log p over every target token of its W x M x B blocks, divided
by the number of those targets, however the blocks are spread over micro-batches and processes.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR

from train_loop import best
from train_loop.checkpoint import unsharded
from train_loop.data import Split, TrainingData, Window
from train_loop.evaluate import evaluate_splits
from train_loop.finite import FiniteGuard
from train_loop.loss import count_targets, next_token_loss
from train_loop.position import Place, Position
from train_loop.process import Stopped
from train_loop.services import Services
from train_loop.settings import Settings


def train(
    *,
    model: torch.nn.Module,
    optimizer: AcceleratedOptimizer,
    scheduler: LambdaLR,
    position: Position,
    train_split: TrainingData,
    eval_splits: dict[str, Split],
    settings: Settings,
    services: Services,
) -> None:
    """Trains `model` in place, from `position` on, which moves along. `model` and `optimizer` come from Accelerate's
    `prepare`, `scheduler` does not. The first of `eval_splits` decides about the best model and early stopping.

    Raises, on all processes alike: UserError where a loss or a gradient norm is not finite, before the weights are
    touched; Stopped, with a checkpoint written, when the run was asked to stop.
    """
    metrics, checkpoints, stop = services.metrics, services.checkpoints, services.stop
    accelerator, device = services.accelerator, services.accelerator.device
    num_steps = settings.num_steps(train_split.blocks_in_epoch(settings), accelerator.num_processes)
    saved_step, last_step = position.step, best.last_step(position, num_steps, settings)
    windows = windows_from(position, train_split, settings, accelerator)
    finite = FiniteGuard(optimizer, accelerator, checkpoints)
    model.train()

    while True:  # once more than there are steps: the last evaluation and the last save are made here, too
        # evaluate when due: also the untrained model, and where a stop cut the evaluation short
        if best.evaluation_is_due(position, last_step, settings):
            finite.look()
            metrics.log_training()
            evaluation = evaluate_splits(model, eval_splits, settings, accelerator, metrics.show_progress, stop)
            if evaluation is not None:  # it was not stopped
                finite.check_evaluation(position.step, evaluation)
                best.take_evaluation(position, evaluation, settings)
                last_step = best.last_step(position, num_steps, settings)
                written = services.samples.write(model, device) if services.samples else None
                metrics.log_evaluation(position, evaluation, written)

        # save when due, and before the run stops
        stopping = stop.agreed(accelerator, checkpoints.clock.look(position.step))
        if position.step > saved_step and (stopping or checkpoints.is_due(position, last_step)):
            finite.look()
            checkpoint, saved_step = checkpoints.save(position, model, optimizer, metrics), position.step
            if services.publisher and not stopping and position.step < last_step:
                services.publisher.push_checkpoint(checkpoint, position.step, model, metrics)
        if stopping or position.step == last_step:
            break
        if checkpoints.clock.is_over:  # once more round: the last evaluation is not in the checkpoint to resume from
            last_step = position.step
            continue

        # one optimizer step: gradients of the window, divided by its number of targets on all processes
        assert all(p.grad is None for p in model.parameters()), "gradients are left over: zero_grad() is missing"
        window = next(windows)
        tensors = {name: value.to(device, non_blocking=True) for name, value in window.tensors.items()}
        num_targets = accelerator.reduce(count_targets(tensors["labels"]), "sum")
        named = {"step": position.step, "label_smoothing": settings.label_smoothing_factor}  # for the objective
        sums = forward_backward(model, tensors, num_targets, accelerator, named)
        sums = accelerator.reduce(sums, "sum")
        grad_norm = unsharded(accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf))
        finite.check(position.step + 1, sums["loss"], grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        position.move_to(window.end)
        if accelerator.scaler is not None and not torch.isfinite(grad_norm):
            # float16's scaler met an overflow: it kept the weights as they were, and halved its scale
            metrics.count_skipped_step()
            continue
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        position.step += 1

        # log when due. Whatever a line should hold beside the sums goes into this dict: a number, or a tensor of one
        values = {"learning_rate": learning_rate, "grad_norm": grad_norm}
        metrics.count_step(position.step, position.in_epochs(), sums, num_targets, values)
        if position.step % settings.logging_steps == 0 or (position.step == 1 and settings.logging_first_step):
            finite.look()
            metrics.log_training()

    if stop.number and (position.step < last_step or position.evaluated_step != position.step):
        raise Stopped(f"after step {position.step} of {last_step}; {checkpoints.say_latest()}", checkpoints.latest)


def forward_backward(
    model: torch.nn.Module,
    tensors: dict[str, torch.Tensor],
    num_targets: torch.Tensor,
    accelerator: Accelerator,
    named: dict[str, float],
) -> dict[str, torch.Tensor]:
    """Adds the gradient of (sum of nats / `num_targets`) to the parameters' gradients, and exchanges it between the
    processes. Returns the sums over this process's targets: {"loss": nats, and the loss's further sums to log}.

    `tensors`: of a window, each [M, B, T]. `num_targets`: of all processes. `named`: what the objective gets by name.
    """
    sums: dict[str, torch.Tensor] = {}
    num_micro_batches = len(tensors["labels"])
    for i in range(num_micro_batches):
        # gradients are summed up here, and exchanged between processes with the last micro-batch only
        is_last = i == num_micro_batches - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            nll, _, extras = next_token_loss(model, {name: value[i] for name, value in tensors.items()} | named)
            # times the number of processes, because the exchange averages over them
            accelerator.backward(nll * accelerator.num_processes / num_targets.clamp(min=1))
        for name, value in {"loss": nll.detach(), **extras}.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def windows_from(
    position: Position, split: TrainingData, settings: Settings, accelerator: Accelerator
) -> Iterator[Window]:
    """This process's windows from `position` on, epoch after epoch, without end. `position` is not changed."""
    place = Place(position.epoch, position.window, position.per_epoch, position.stream)
    while True:
        for window in split.windows(place, settings, accelerator):  # the rest of the epoch's
            place, step = window.end, position.step
            yield window
            is_there = (position.epoch, position.window) == (place.epoch, place.window)
            assert is_there or position.step == step, "position.move_to(window.end) is missing after a step"
        place = Place(place.epoch + 1, 0, place.per_epoch, place.stream)
