"""The loss of a model on the whole validation split, the same number for any batch size and number of processes."""

import math

import numpy as np
import torch
from tqdm import tqdm

from train_loop.data import Windows, load_windows
from train_loop.loss import next_token_loss


def perplexity(loss):
    """exp(nats per token); infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


@torch.no_grad()
def evaluate(model, blocks, settings, accelerator, show_progress=False):
    """{"eval_loss": nats per target token, "perplexity": its exponential, "eval_tokens": number of targets}.

    The nats and the targets of every process are summed once, at the end, in float64. Training is left as it was:
    the model's mode is put back, and no random number is drawn.
    """
    windows = Windows(
        blocks,
        np.arange(len(blocks)),
        settings.per_device_eval_batch_size,
        1,
        accelerator.num_processes,
        accelerator.process_index,
    )
    sums = {}  # over the split's targets: nats, targets, and whatever else the loss wants logged
    was_training = model.training
    model.eval()
    batches = tqdm(load_windows(windows), desc="evaluating", unit=" batches", disable=not show_progress, leave=False)
    for input_ids, labels in batches:
        nll, num_targets, extras = next_token_loss(
            model, input_ids[0].to(accelerator.device), labels[0].to(accelerator.device)
        )
        for name, value in {"loss": nll, "tokens": num_targets, **extras}.items():
            sums[name] = sums.get(name, 0) + value.double()
    model.train(was_training)
    sums = {name: value.item() for name, value in accelerator.reduce(sums, "sum").items()}
    num_targets = sums.pop("tokens")
    means = {f"eval_{name}": value / num_targets for name, value in sums.items()}
    return {**means, "perplexity": perplexity(means["eval_loss"]), "eval_tokens": int(num_targets)}
