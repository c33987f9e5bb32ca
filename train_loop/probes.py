"""Tests on a few tokens, before training, of what a model does with a block: its config may be silent or wrong."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train_loop.data import TrainingData


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether the logits at a position stay the same when the tokens after it change. If not, the model sees what it
    must predict, and its loss means nothing.

    The test runs the model, it does not read the config: two rows of 12 tokens with an equal first half take one
    forward pass. Dropout is off, and torch's random state is restored.
    """
    ids = torch.arange(12).repeat(2, 1) * 7
    ids[1, 6:] += 1
    ids %= _num_embeddings(model)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            first, second = model(input_ids=ids, use_cache=False).logits[:, :6]
    finally:
        model.train(was_training)
    # A causal model differs only by rounding. The smallest difference seen in a random non-causal model was a
    # thousandth of the logits' spread. Non-finite logits pass here: the loop stops at them.
    return not (first - second).abs().max() > 1e-5 * first.std()


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether a document has the same logits alone and after another document in its block, if `position_ids` restart.

    The test runs the model: it may accept positions but not mask by them, or carry a state along."""
    ids = torch.arange(12)[None] * 7 % _num_embeddings(model)
    positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
    was_training = model.training
    model.eval()
    try:
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:]
        alone = model(input_ids=ids[:, 6:], use_cache=False).logits
    except TypeError:  # the model takes no positions
        return False
    finally:
        model.train(was_training)
    return torch.allclose(packed, alone, rtol=1e-4, atol=1e-4 * alone.std().item())


def keep_apart_where_possible(model: PreTrainedModel, splits: Iterable[TrainingData]) -> list[str]:
    """Sets `documents_apart` of `splits` to False if the model cannot do it. Returns sentences for the user."""
    splits = [split for split in splits if split.documents_apart]
    if not splits or keeps_documents_apart(model):
        return []
    for split in splits:
        split.documents_apart = False
    return [f"the rows of a block are not kept apart: the attention of {model.config.model_type} cannot do that"]


def _num_embeddings(model: PreTrainedModel) -> int:
    table: Any = model.get_input_embeddings()  # transformers says Module
    return table.num_embeddings


@dataclass(frozen=True)
class Head:
    """What a model does between its last hidden states and its logits, and what it adds to its loss."""

    in_chunks: bool  # logits = capped(scale * (hidden @ weight.T + bias)), and nothing else
    scale: float = 1.0
    cap: float | None = None  # capped(x) = cap * tanh(x / cap)
    auxiliary_weight: float | None = None  # of the auxiliary loss that the config asks for
    remarks: tuple[str, ...] = ()  # sentences for the user

    def adapt(self, logits: Tensor) -> Tensor:
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def head_of(model: PreTrainedModel) -> Head:
    """The result of `inspect_head`, computed once per model. `model` is not wrapped by DDP."""
    if "inspected_head" not in model.__dict__:
        model.__dict__["inspected_head"] = inspect_head(model)
    return model.__dict__["inspected_head"]


@torch.no_grad()
def inspect_head(model: PreTrainedModel) -> Head:
    """Finds out what `model` does to its logits. Made-up numbers, from tiny to huge, replace the result of its last
    linear layer. The logits then show exactly what the model does to them, whatever its weights are."""
    weight, remarks = _auxiliary_weight(model)
    full = lambda why: Head(False, auxiliary_weight=weight, remarks=(f"from full logits: {why}", *remarks))  # noqa: E731
    head = model.get_output_embeddings()
    # a subclass with a forward of its own (an adapter, a quantised layer) is more than weight and bias
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or head._forward_hooks:
        return full(f"the head is a {type(head).__name__}, not a plain linear layer")
    table: Any = model.get_input_embeddings()  # transformers says Module
    ids = torch.arange(8, device=model.device)[None] * 7 % table.num_embeddings
    made_up = torch.linspace(-60, 60, 8 * head.out_features, device=model.device).view(1, 8, -1)
    tiny, huge, seen = 2.0**-10, 1e6, []
    made_up[0, 0, 0], made_up[0, 0, 1] = tiny, huge

    def forward(hidden: Tensor) -> Tensor:
        seen.append(tuple(hidden.shape))
        return made_up.clone()

    was_training = model.training
    model.eval()
    try:
        with forward_replaced(head, forward), torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(was_training)
    if seen != [(1, 8, head.in_features)] or logits.shape != made_up.shape:
        return full("the model does not take its logits from one call of its head")
    if logits.requires_grad:  # the made-up ones had no gradient
        return full("trained weights stand between the model's head and its logits")
    scale, cap = logits[0, 0, 0].item() / tiny, logits[0, 0, 1].item()
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    found = Head(True, scale, cap if cap < scale * huge / 2 else None, weight, remarks)
    if not torch.allclose(found.adapt(made_up), logits, rtol=1e-5, atol=1e-5):
        return full("the model changes its logits in a way that is not known here")
    return found


def _auxiliary_weight(model: PreTrainedModel) -> tuple[float | None, tuple[str, ...]]:
    """(weight, remarks) of the auxiliary loss of a mixture of experts, if `model.config` asks for it."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None, ()
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        for place in (model, config):
            if getattr(place, name, None) is not None:
                return float(getattr(place, name)), ()
    return None, ("output_router_logits is on, but no weight for the auxiliary loss is known: it is left out",)


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    before = module.__dict__.get("forward")  # Accelerate puts its autocast there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
