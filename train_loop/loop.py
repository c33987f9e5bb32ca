"""The loop. Everything that changes a weight happens here, in the order in which it is written.

W: processes, M: micro-batches of a window (one optimizer step, on one process), B: blocks of a micro-batch, T: tokens
of a block. The loss of an optimizer step is the sum of -log p over every target token of its W x M x B blocks, divided
by the number of those targets: how the blocks are spread over micro-batches and processes does not show.
"""

import contextlib
import itertools
import math

import torch

from train_loop.data import Windows, load_windows, shuffled
from train_loop.evaluate import evaluate
from train_loop.loss import count_targets, next_token_loss


def steps_per_epoch(num_blocks, settings, world_size):
    """Optimizer steps in one pass over the training blocks; the last may be a short one."""
    blocks_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world_size
    return math.ceil(num_blocks / blocks_per_step)


def num_steps(num_blocks, settings, world_size):
    """Optimizer steps of the whole run."""
    return settings.max_train_steps or math.ceil(
        settings.num_train_epochs * steps_per_epoch(num_blocks, settings, world_size)
    )


def train(model, optimizer, scheduler, train_split, eval_split, settings, accelerator, metrics):
    """Trains `model` in place. `model` and `optimizer` are prepared by Accelerate, `scheduler` is not.

    Returns the last evaluation. Raises FloatingPointError, on all processes and before the weights are touched, when
    a loss or a gradient norm is not finite.
    """
    W, device = accelerator.num_processes, accelerator.device
    num_blocks = len(train_split.blocks)
    per_epoch, last_step = steps_per_epoch(num_blocks, settings, W), num_steps(num_blocks, settings, W)
    evaluation = evaluate(model, eval_split, settings, accelerator, metrics.show_progress)
    metrics.log_evaluation(0, 0.0, evaluation)

    model.train()
    step = 0
    for epoch in itertools.count():
        windows = Windows(
            train_split.blocks,
            shuffled(num_blocks, settings.seed, epoch),
            settings.per_device_train_batch_size,
            settings.gradient_accumulation_steps,
            W,
            accelerator.process_index,
            document_end=train_split.document_end,
        )
        batches = load_windows(windows, pin_memory=device.type == "cuda")
        for done, window in enumerate(batches, start=1):
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

            grad_norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm or math.inf)
            sums = accelerator.reduce(sums, "sum")
            stop_if_not_finite(step + 1, sums["loss"], grad_norm, accelerator)
            optimizer.step()
            optimizer.zero_grad()
            if not torch.isfinite(grad_norm):  # float16's scaler kept the weights as they were, and halved its scale
                metrics.count_skipped_step()
                continue
            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            step += 1

            metrics.count_step(step, epoch + done / per_epoch, sums, num_targets, learning_rate, grad_norm)
            evaluate_now = step == last_step or (
                step % settings.eval_steps == 0 if settings.eval_steps else done == per_epoch
            )
            if step % settings.logging_steps == 0 or evaluate_now:
                metrics.log_training()
            if evaluate_now:
                evaluation = evaluate(model, eval_split, settings, accelerator, metrics.show_progress)
                metrics.log_evaluation(step, epoch + done / per_epoch, evaluation)
            if step == last_step:
                return evaluation


def stop_if_not_finite(step, nll_sum, grad_norm, accelerator):
    """Both numbers are the same on every process, so all of them stop together."""
    # with float16's scaler an infinite gradient is no accident: the scaler skips that step
    checked = nll_sum if accelerator.scaler is not None else nll_sum + grad_norm
    if not torch.isfinite(checked):
        raise FloatingPointError(
            f"step {step}: the loss ({nll_sum.item()} nats) or the gradient norm ({float(grad_norm)}) is not finite; "
            "the weights are those of the step before. Try a lower learning_rate, or more num_warmup_steps"
        )
