"""The objective: a plain function, called for training and evaluation alike. Change it here."""

import torch.nn.functional as F

from train_loop.data import IGNORED


def count_targets(labels):
    """Number of target tokens in `labels` [..., T], as a tensor on their device: the first position of a block has no
    token before it, so it is never predicted; a label of -100 is no target."""
    return (labels[..., 1:] != IGNORED).sum()


def next_token_loss(model, batch):
    """(sum of nats, number of targets, extras) of a micro-batch: {"input_ids", "labels"}, each [B, T], and what else
    the model's forward takes ("position_ids" where documents are kept apart).

    The sum of -log p(token | tokens before it in its block) over the targets is a float32 scalar, not divided:
    `loop.py` and `evaluate.py` divide by the number of targets of the whole optimizer step or split. Extras, {name:
    scalar tensor without gradient}, are further sums over the targets; they are logged as means beside the loss.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    nll_sum = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    return nll_sum, count_targets(labels), {}
