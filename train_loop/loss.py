"""The objective: what training minimises. Change it here, on this screen.

B: blocks in a micro-batch, T: tokens of a block, N: rows, the positions that predict a token, V: vocabulary.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from train_loop.cross_entropy import cross_entropy
from train_loop.data import IGNORED
from train_loop.head import Batch, auxiliary_loss, sum_over_rows


def objective(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, **of_rows: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(sum to be minimised, {name: further sum to be logged}) over some rows of a micro-batch, scalars.

    `logits` [N, V] are float32, `targets` [N] the tokens that follow; -100 is not a target and must add nothing. Return
    sums, not means: the loop divides by the number of targets of the optimizer step. Any function that autograd can
    differentiate works. `of_rows`: "positions" [N] in the block, from 0; the run's "step"; each "target_..." [N] of the
    batch. Name those that you need in the signature, each with a default, as one may be missing: evaluation
    has no step.
    """
    # inplace takes less time and memory; drop it where `logits` are used once more, as a z-loss does
    nats = cross_entropy(logits, targets, label_smoothing, inplace=True)
    return nats.sum(), {}


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum, number of targets, extras) of a micro-batch, for training: the objective's sum over all its rows.

    A loss that needs more than the logits of some rows (a teacher, hidden states, whole sequences) goes here. `batch`:
    see `head.sum_over_rows`; what you add to it as "target_..." [B, T, ...] goes to the objective. Extras must be
    without gradient; they are logged as means over the targets. A mixture of experts adds its auxiliary loss, if its
    config asks for it (`output_router_logits`), times the number of targets.
    """
    [(total, extras)], output = sum_over_rows(model, batch, objective)
    num_targets = count_targets(batch["labels"])
    auxiliary = auxiliary_loss(model, output)
    if auxiliary is not None:
        total = total + auxiliary[0] * num_targets
        extras = {**extras, "aux_loss": auxiliary[1] * num_targets}
    return total, num_targets, extras


def plain_next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of nats, number of targets, extras) of a micro-batch, for evaluation: -log p(token | earlier tokens of its
    block), whatever the objective is, so that exp gives a perplexity. Extras: the objective's sum as "objective", its
    extras, those of `plain`, and "token_nats" [B, T - 1], the nats of each target, 0 where there is none."""
    rows: list[Tensor] = []
    kept = functools.partial(plain, nats_of_rows=rows)
    [(nll_sum, of_text), (total, extras)], _ = sum_over_rows(model, batch, kept, objective)
    labels = batch["labels"]
    token_nats = torch.cat(rows).view(len(labels), -1)
    return nll_sum, count_targets(labels), {"objective": total, **extras, **of_text, "token_nats": token_nats}


def plain(
    logits: Tensor,
    targets: Tensor,
    target_is_text: Tensor | None = None,
    *,
    nats_of_rows: list[Tensor],
    **of_rows: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy; also appends the nats [N] to `nats_of_rows`. Not in place: the objective needs the logits after
    it. `target_is_text` [N] tells text from special tokens that stand for no text; with it, the extras are the nats and
    the number of the text targets."""
    nats = cross_entropy(logits, targets)
    nats_of_rows.append(nats.detach())
    if target_is_text is None:
        return nats.sum(), {}
    is_text = target_is_text & (targets != IGNORED)
    return nats.sum(), {"text_nats": (nats * is_text).sum(), "text_targets": is_text.sum().float()}


def count_targets(labels: Tensor) -> Tensor:
    """Number of targets in `labels` [..., T], as a tensor on their device. The first token of a block has no token
    before it and is never predicted; a label of -100 is not a target."""
    return (labels[..., 1:] != IGNORED).sum()
