"""The loss of a model on the whole validation split, the same number for any batch size and number of processes."""

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from train_loop.data import Split, Windows, load_windows
from train_loop.loss import plain_next_token_loss
from train_loop.settings import Settings
from train_loop.stop import StopSignal


def perplexity(loss):
    """exp(nats per token); infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf


def named_perplexities(loss, split):
    """Perplexities that do not depend on the tokenizer, and the counts that they come from.

    word_perplexity: exp(nats per word), bits_per_byte: bits per byte of the text in UTF-8. The nats are those of all
    tokens of the split at the mean of the tokens that were targets: the first of a block and those dropped at the end
    are not left out of the sum while their words and bytes are counted.
    """
    nats = loss * split.num_tokens
    return {
        "word_perplexity": perplexity(nats / split.num_words),
        "bits_per_byte": nats / split.num_bytes / math.log(2),
        "eval_split_tokens": split.num_tokens,
        "eval_words": split.num_words,
        "eval_bytes": split.num_bytes,
    }


@torch.no_grad()
def evaluate(model, split, settings, accelerator, show_progress=False, stop=None):
    """{"eval_loss": nats per target token, "perplexity": its exponential, "eval_tokens": number of targets,
    "eval_nats": their sum, "eval_stride", "eval_dropped_tokens": tokens at the end that no window holds}, and on
    request the `named_perplexities`. "eval_objective", what training minimises per target, stands beside the loss where
    it is not plain cross entropy.

    Windows of T tokens move on by the stride, which is T if the settings say nothing else; the targets of a window are
    its tokens that the window before did not have, so each sees at least T - stride tokens of context, except in the
    first window. With stride T the context begins anew with each block, and the first token of a block is no target.
    Returns None where `stop`, a `StopSignal`, comes in between.
    The nats and the targets of every process are summed once, at the end, in float64. Training is left as it was:
    the model's mode is put back, and no random number is drawn.
    """
    tokens, block_size = split.blocks.reshape(-1), split.blocks.shape[1]
    stride = settings.eval_stride or block_size
    blocks = sliding_window_view(tokens, block_size)[::stride]
    windows = Windows(
        blocks,
        np.arange(len(blocks)),
        settings.per_device_eval_batch_size,
        1,
        accelerator.num_processes,
        accelerator.process_index,
        num_context=block_size - stride,
        document_end=split.document_end,
    )
    sums = {}  # over the split's targets: nats, targets, and whatever else the loss wants logged
    was_training = model.training
    model.eval()
    batches = tqdm(load_windows(windows), desc="evaluating", unit=" batches", disable=not show_progress, leave=False)
    for window in batches:
        if stop is not None and stop.agreed(accelerator):
            model.train(was_training)
            return None
        batch = {name: value[0].to(accelerator.device) for name, value in window.items()}
        nll, num_targets, extras = plain_next_token_loss(model, batch)
        for name, value in {"loss": nll, "tokens": num_targets, **extras}.items():
            sums[name] = sums.get(name, 0) + value.double()
    model.train(was_training)
    sums = {name: value.item() for name, value in accelerator.reduce(sums, "sum").items()}
    num_targets = sums.pop("tokens")
    if sums["objective"] == sums["loss"]:  # plain cross entropy is what is trained
        del sums["objective"]
    means = {f"eval_{name}": value / num_targets for name, value in sums.items()}
    result = {**means, "perplexity": perplexity(means["eval_loss"]), "eval_tokens": int(num_targets)}
    if settings.named_perplexities:
        result |= named_perplexities(means["eval_loss"], split)
    if settings.named_perplexities or settings.eval_stride:
        num_dropped = split.num_dropped + (len(tokens) - block_size) % stride
        result |= {"eval_nats": sums["loss"], "eval_stride": stride, "eval_dropped_tokens": num_dropped}
    return result


def evaluate_splits(
    model: torch.nn.Module,
    splits: dict[str, Split],
    settings: Settings,
    accelerator: Accelerator,
    show_progress: bool = False,
    stop: StopSignal | None = None,
) -> dict[str, Any] | None:
    """What `evaluate` returns of the first split, and of each further one the same as "eval_<name>_loss" and so on.
    None where a stop came in between."""
    result = {}
    for name, split in splits.items():
        found = evaluate(model, split, settings, accelerator, show_progress, stop)
        if found is None:
            return None
        result |= {f"eval_{name}_{key.removeprefix('eval_')}": found[key] for key in found} if result else found
    return result
