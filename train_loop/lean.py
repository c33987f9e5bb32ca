"""Modules with the same results up to rounding, in less time and memory: same parameters, same random numbers.

tests/benchmarks measures the gain. With `--tuning false` the model stays as transformers made it, and this file is not
imported. Some of what it uses from transformers and torch is private. If a version has moved it, a warning says so and
the model keeps its own modules.

B: blocks in a micro-batch, H: attention heads, T: tokens of a block, D: width of a head.
"""

import functools
import inspect
import os
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from train_loop.errors import one_line, warn

try:  # no public name gives the functions that a model uses for attention and activation
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.activations import NewGELUActivation
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.pytorch_utils import Conv1D

    MOVED = None
except ImportError as error:
    MOVED = error

NUM_SCORES = 2**18  # attention scores computed at once, at least one head's a thread: 1 MiB, which fits a core's cache
# the arguments of transformers' attention function that `_attention` supports; a new one could change the result
ATTENTION_ARGUMENTS = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal"}
ATTENTION_ARGUMENTS |= {"position_bias", "kwargs"}


def use_lean_modules(model: PreTrainedModel) -> None:
    """Replaces modules of `model` and its attention function, in place, by leaner equivalents.

    If transformers has moved what this needs, a warning says so and the model stays unchanged.
    """
    if MOVED:
        return _say_plain(one_line(MOVED))
    for module in list(model.modules()):
        if isinstance(module, GPT2MLP) and all(hasattr(module, name) for name in ("c_fc", "act", "c_proj", "dropout")):
            module.forward = functools.partial(_forward_of_mlp, module)
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # it is eight operations, and each keeps a tensor
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
            elif type(child) is torch.nn.Dropout and hasattr(torch, "native_dropout"):  # an undocumented name
                setattr(module, name, Dropout(child.p).train(child.training))
    # private: the attention function can be set in a public way, but not read
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return None
    if unknown := inspect.signature(sdpa_attention_forward).parameters.keys() - ATTENTION_ARGUMENTS:
        return _say_plain(f"attention takes {', '.join(sorted(unknown))}")
    try:
        AttentionMaskInterface.register("lean", sdpa_mask)
        AttentionInterface.register("lean", _attention)
        model.set_attn_implementation("lean")
    except AttributeError as error:
        _say_plain(one_line(error))


def _say_plain(reason: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        warn(f"tuning: this version of transformers is not one that lean.py knows ({reason}). Slower modules are used")


class Dropout(torch.nn.Dropout):
    """Keeps a mask of bytes for the backward pass, as torch does on a GPU. On a CPU torch keeps one of floats."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(input, self.p, True)[0] if self.training else input


def _forward_of_mlp(mlp: "GPT2MLP", hidden: torch.Tensor) -> torch.Tensor:
    """Keeps only the activation's input, and recomputes its result in the backward pass."""
    hidden = mlp.c_fc(hidden)
    if not torch.is_grad_enabled() and isinstance(mlp.act, torch.nn.GELU):
        # private: no public GELU is in place
        return mlp.dropout(mlp.c_proj(torch.ops.aten.gelu_(hidden, approximate=mlp.act.approximate)))
    projection = mlp.c_proj
    if type(projection) is not Conv1D or projection._forward_hooks or projection._forward_pre_hooks:
        project = lambda hidden: projection(mlp.act(hidden))  # noqa: E731
        draws = not isinstance(projection, Conv1D)  # LoRA's layer may have dropout, which must be repeated
        return mlp.dropout(checkpoint(project, hidden, use_reentrant=False, preserve_rng_state=draws))
    weight: torch.Tensor = projection.weight
    bias: torch.Tensor = projection.bias
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):  # it does not act inside a custom function
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    B, T, _ = hidden.shape
    return mlp.dropout(ActivationAndProduct.apply(hidden.flatten(0, 1), weight, bias, mlp.act).view(B, T, -1))


class ActivationAndProduct(torch.autograd.Function):
    """act(hidden) @ weight + bias, for hidden [B x T, D]. It keeps only `hidden` and `weight` for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, act: torch.nn.Module
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.act = act
        return torch.addmm(bias, act(hidden), weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_(needs_hidden)
            activated = ctx.act(hidden)
        grad_weight = activated.detach().T @ grad if needs_weight else None
        grad_hidden = torch.autograd.grad(activated, hidden, grad @ weight.T)[0] if needs_hidden else None
        return grad_hidden, grad_weight, grad.sum(0) if needs_bias else None, None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: query, key, value [B, H, T, D] -> ([B, T, H, D], None)."""
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # not ours: a mask of numbers, added to the scores; no mask and not causal, so that every token sees all
    takes_mask = is_causal if attention_mask is None else attention_mask.dtype == torch.bool
    same_shape = query.shape == key.shape == value.shape and kwargs.get("position_bias") is None
    if torch.is_autocast_enabled("cpu"):  # casts as for torch's own attention
        query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in (query, key, value))
    known = query.dtype in (torch.float32, torch.bfloat16)
    ours = dropout and query.device.type == "cpu" and known and same_shape and takes_mask
    if not ours or torch.compiler.is_compiling():  # without dropout, or on a GPU, torch's kernels keep little
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is None:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    hidden = attention_mask.logical_not().expand(len(query), -1, -1, -1)
    return DropoutAttention.apply(query, key, value, hidden, dropout, scaling or query.shape[-1] ** -0.5), None


class DropoutAttention(torch.autograd.Function):
    """dropout(softmax(query @ key.T * scale)) @ value, [B, T, H, D], with scores at `hidden` [B, 1, T, T] left out.

    For the backward pass it keeps only the dropout mask, as bytes. It recomputes the rest, a few blocks or heads at a
    time: in memory that fits the cache, or in a long block a head for each thread. On a CPU torch keeps three tensors
    of floats as large as all scores. The idea is that of FlashAttention (Dao et al. 2022, arXiv:2205.14135), without
    tiles in a head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden: torch.Tensor,
        p: float,
        scale: float,
    ) -> torch.Tensor:
        B, H, T, D = query.shape
        kept = torch.empty(B, H, T, T, dtype=torch.bool).bernoulli_(1 - p)  # the same draws as torch's dropout
        output = query.new_empty(B, T, H, D)
        for some in _groups(B, H, T * T):
            probs = _probabilities(query[some], key[some], hidden[some[0]], scale).mul_(kept[some])
            output.transpose(1, 2)[some] = (probs @ value[some]).mul_(1 / (1 - p))
        ctx.save_for_backward(query, key, value, hidden, kept)
        ctx.p, ctx.scale = p, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, hidden, kept = ctx.saved_tensors
        grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
        for some in _groups(len(query), query.shape[1], kept[0, 0].numel()):
            grad = grad_output.transpose(1, 2)[some] / (1 - ctx.p)
            probs = _probabilities(query[some], key[some], hidden[some[0]], ctx.scale)
            grad_value[some] = (probs * kept[some]).transpose(2, 3) @ grad
            grad_probs = (grad @ value[some].transpose(2, 3)).mul_(kept[some])
            grad_scores = _softmax_backward(grad_probs, probs).mul_(ctx.scale)
            grad_query[some] = grad_scores @ key[some]
            grad_key[some] = grad_scores.transpose(2, 3) @ query[some]
        return grad_query, grad_key, grad_value, None, None, None


def _softmax_backward(grad: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """The gradient of the scores, from `grad` of their softmax `probs`, over the last dimension."""
    fused = getattr(torch, "_softmax_backward_data", None)  # one pass over memory instead of three, but private
    if fused:
        return fused(grad, probs, -1, probs.dtype)
    return probs * (grad - (grad * probs).sum(-1, keepdim=True))


def _groups(num_blocks: int, num_heads: int, scores_of_a_head: int) -> list[tuple[slice, slice]]:
    """(blocks, heads) that are computed together: blocks with all their heads, or some heads of one block."""
    num = max(NUM_SCORES // scores_of_a_head, min(num_heads, torch.get_num_threads()))  # of heads
    if num < num_heads:
        heads = [slice(first, first + num) for first in range(0, num_heads, num)]
        return [(slice(block, block + 1), some) for block in range(num_blocks) for some in heads]
    size = num // num_heads
    return [(slice(first, first + size), slice(None)) for first in range(0, num_blocks, size)]


def _probabilities(query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor, scale: float) -> torch.Tensor:
    scores = (query @ key.transpose(2, 3)).mul_(scale).masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1, out=scores)
