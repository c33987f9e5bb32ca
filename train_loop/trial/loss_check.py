"""Checks once, before the first step, what the loss returns. It only reports; it changes nothing."""

import inspect

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from train_loop.data import TrainingData
from train_loop.head import auxiliary_loss, check_result
from train_loop.loss import next_token_loss, plain_next_token_loss
from train_loop.settings import Settings
from train_loop.trial.micro_batch import trial_batch

PIECE_TOKENS = 65  # of a block, to check whether the objective is a sum


def check_loss(model: nn.Module, split: TrainingData, settings: Settings, accelerator: Accelerator) -> list[str]:
    """Remarks for the user about the loss of one training block: if the objective looks like a mean, or if the model's
    own loss (`labels=`) is not plain cross entropy. One block does not change the peak of memory. Under FSDP nothing is
    checked. The model is in evaluation mode, so no random number is drawn.

    Raises TypeError or ValueError if `next_token_loss` or `objective` returns something wrong.
    """
    if accelerator.distributed_type == "FSDP":
        return []
    model = getattr(model, "module", model)  # DDP would wait for a backward pass
    batch = trial_batch(split, 1, accelerator.device)
    was_training = model.training
    model.eval()
    try:
        options = {"step": 0, "label_smoothing": settings.label_smoothing_factor}
        with torch.enable_grad():
            result = next_token_loss(model, batch | options)
            check_result(result, next_token_loss, ("sum", "number of targets", "extras"), True)
        attached = [name for name, value in result[2].items() if value.requires_grad]
        if attached:
            raise ValueError(
                f"next_token_loss: the extra {attached[0]!r} still has its gradient, and would keep the graph of each "
                "step in memory: return it with .detach()"
            )
        total = result[0].item()
        del result
        with torch.no_grad():
            plain = plain_next_token_loss(model, batch)
            nll_sum, num_targets = plain[0].item(), int(plain[1])
            own = _own_loss(model, batch) if num_targets else None
            # so few tokens that both copies are one chunk of rows
            piece = {name: value[:, :PIECE_TOKENS] for name, value in batch.items()}
            copies = {name: torch.cat([value, value]) for name, value in piece.items()}
            of_one, of_two = (next_token_loss(model, some | options)[0].item() for some in (piece, copies))
    finally:
        model.train(was_training)
    if nll_sum == nll_sum and total != total:
        raise ValueError(
            f"the objective of one training block is nan, while its plain cross entropy is {nll_sum:.4f} nats: check "
            "for 0 log 0 or inf - inf in loss.py, and for logits that are used after cross_entropy(..., inplace=True)"
        )
    remarks = []
    if abs(of_two) < 1.5 * abs(of_one):  # a sum doubles, a mean does not change
        remarks += [
            f"warning: the objective of a piece of one block is {of_one:.4f}, of two copies of it {of_two:.4f}.",
            "A sum would double. If loss.py returns a mean, return a sum: the loop divides by the targets",
        ]
    if own is not None:
        mean, T = nll_sum / num_targets, batch["labels"].shape[1]
        tolerance = 1e-4 if accelerator.mixed_precision == "no" else 1e-2  # bfloat16 logits
        # some models divide by the T tokens of a block, of which T - 1 are targets
        if min(abs(own / mean - 1), abs(own / (mean * (T - 1) / T) - 1)) > tolerance:
            remarks += [
                "the model's own loss is not the plain cross entropy trained here:",
                f"{own:.6f} and {mean:.6f} nats per target, on one training block",
            ]
    return remarks


def _own_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> float | None:
    """The model's own loss in nats per target, without a mixture of experts' auxiliary loss; None if it has no
    loss."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers warns that GPT-2's class names no loss, and takes the plain one
    try:
        output = model(**batch, use_cache=False)
    finally:
        logging.set_verbosity(verbosity)
    if output.loss is None:
        return None
    auxiliary = auxiliary_loss(model, output)
    return output.loss.item() - (auxiliary[0].item() if auxiliary else 0.0)
