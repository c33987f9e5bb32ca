"""From the model's last hidden states to an objective, chunk by chunk: the logits of all rows never exist together.

`loss.py` defines what is minimised. Here the rows are cut into chunks. Autograd differentiates the objective only with
respect to a chunk's logits; the head's two products are written by hand. The result equals that of full logits.

B: blocks in a micro-batch, T: tokens of a block, N: rows, the B x (T - 1) positions that predict a token, D: width of
the model, V: vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train_loop.probes import Head, forward_replaced, head_of

ROWS_PER_CHUNK = {"cpu": 256}  # rows of logits at once: more take memory and save no time
ROWS_PER_CHUNK_ELSEWHERE = 2048
# in a lower precision: rows per product for the weight's gradient. Each product is added in float32, which reads and
# writes the complete gradient
ROWS_PER_LOW_GROUP = 512

Batch = dict[str, Any]  # "input_ids" and "labels" [B, T], and what `sum_over_rows` names
Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def auxiliary_loss(model: nn.Module, output: Any) -> tuple[Tensor, Tensor] | None:
    """(what a mixture of experts adds to its own loss, the same without its weight), scalars; None if its config
    does not ask for it. `output` is what the model's forward returned."""
    causal_lm: Any = getattr(model, "module", model)
    weight = head_of(causal_lm).auxiliary_weight
    aux_loss = getattr(output, "aux_loss", None)
    return None if weight is None or aux_loss is None else (weight * aux_loss, aux_loss.detach())


@dataclass
class _Rows:
    """What belongs to the N rows of a micro-batch, and the sums over them so far."""

    head: Head
    objectives: tuple[Objective, ...]
    targets: Tensor  # [N]
    of_rows: dict[str, Any]
    sums: list[dict[str, Tensor]] = field(default_factory=list)  # per objective: its own sum as "", and its extras

    def add(self, logits: Tensor, rows: slice) -> Tensor:
        """Adds the objectives' results for some rows to `sums`. Returns the first objective's, with its graph."""
        of_rows = {n: value[rows] if isinstance(value, Tensor) else value for n, value in self.of_rows.items()}
        totals = []
        for i, objective in enumerate(self.objectives):
            differentiated = logits.requires_grad and i == 0
            with torch.set_grad_enabled(differentiated):
                result = objective(logits, self.targets[rows], **of_rows)
            check_result(result, objective, ("sum", "extras"), differentiated)
            totals.append(result[0])
            found = {"": result[0].detach(), **{name: value.detach() for name, value in result[1].items()}}
            if len(self.sums) <= i:
                self.sums.append(found)
            else:
                self.sums[i] = {name: self.sums[i][name] + value for name, value in found.items()}
        return totals[0]


def sum_over_rows(model: nn.Module, batch: Batch, *objectives: Objective) -> tuple[list[tuple[Tensor, dict]], Any]:
    """([(sum, extras) of each objective], what the model's forward returned).

    Each chunk of rows calls objective(logits [n, V] float32, targets [n], **of_rows), which returns (scalar to
    minimise, {name: further scalar}); both are summed over the chunks. Rows whose target is -100 are included. Only the
    first objective's sum can be differentiated; the others are evaluated on the same logits.

    `batch` holds "input_ids" and "labels" [B, T], and what else the model's forward takes. Two kinds of entry go to the
    objectives by name instead: what is not a tensor ("step"), and tensors [B, T, ...] named "target_...". A tensor's
    value at a token goes to the row that predicts this token. Objectives always get "positions", [n]: the row's
    position in its block, from 0.
    """
    causal_lm: Any = getattr(model, "module", model)  # DDP's wrapper has the model inside
    labels, inputs, of_rows = batch["labels"], {}, {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            of_rows[name] = value
        elif name.startswith("target_"):
            of_rows[name] = value[:, 1:].flatten(0, 1)
        elif name != "labels":
            inputs[name] = value
    of_rows["positions"] = torch.arange(labels.shape[1] - 1, device=labels.device).repeat(len(labels))
    rows = _Rows(head_of(causal_lm), objectives, labels[:, 1:].flatten(), of_rows)
    if rows.head.in_chunks:
        with _sum_in_the_place_of_logits(causal_lm, rows):
            output = model(**inputs, use_cache=False)
        first = output.logits.view(())
    else:
        output = model(**inputs, use_cache=False)
        first = _sum_over_logits(output.logits[:, :-1].flatten(0, 1), rows)
    totals = [first, *(sums.pop("") for sums in rows.sums[1:])]
    rows.sums[0].pop("")
    return list(zip(totals, rows.sums, strict=True)), output


@contextlib.contextmanager
def _sum_in_the_place_of_logits(causal_lm: PreTrainedModel, rows: _Rows) -> Iterator[None]:
    """Inside it, the model's forward returns the first objective's sum in place of the logits. The model is called as
    usual, so DDP, FSDP, autocast and hooks work as usual."""
    head, forward_of_model = causal_lm.get_output_embeddings(), causal_lm.forward
    sums = []

    def forward_of_head(hidden: Tensor) -> Tensor:  # [B, T, D]
        hidden = hidden[:, :-1].flatten(0, 1)
        total = _LinearInChunks.apply(hidden, head.weight, head.bias, rows, torch.is_grad_enabled())
        sums.append(total.view(1, 1, 1))  # as many dimensions as logits
        return sums[0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        with forward_replaced(head, forward_of_head):
            output = forward_of_model(*args, **kwargs)
        (output.logits,) = sums  # undoes a cap or a scale that the model applied to the sum
        return output

    with forward_replaced(causal_lm, forward):
        yield


def _sum_over_logits(logits: Tensor, rows: _Rows) -> Tensor:
    """The first objective's sum over full logits [N, V]."""
    num_rows = ROWS_PER_CHUNK.get(logits.device.type, ROWS_PER_CHUNK_ELSEWHERE)
    first, total = 0, torch.zeros((), device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        for chunk in logits.split(num_rows):  # split makes one gradient; slices would add up one each
            chunk = chunk.to(torch.float32, copy=True)
            chunk.padded = chunk.detach()
            total = total + rows.add(chunk, slice(first, first + num_rows))
            first += num_rows
    return total


class _LinearInChunks(torch.autograd.Function):
    """The first objective's sum over logits = hidden @ weight.T + bias, a float32 scalar.

    hidden [N, D], weight [V, D], bias [V] or None. The forward pass turns a chunk's logits into its loss and gradients,
    which are kept for the backward pass. So only one chunk of logits is held, and none is computed twice.
    Products use autocast's precision, as in a linear layer; everything else is float32. In a lower precision, the
    gradients of a few chunks' logits are kept in it, for one larger product.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, needs_grad: bool) -> Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        needs = [needs_grad and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        # float32 even if weights are bfloat16 (FSDP): a bfloat16 sum over many chunks would stop growing
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None

        (N, V), num_rows = (len(hidden), len(weight)), ROWS_PER_CHUNK.get(kind, ROWS_PER_CHUNK_ELSEWHERE)
        # each row of logits begins on a cache line: matrix products on a CPU are up to 1.4 times as fast
        wide = -(-V // 64) * 64
        padded = torch.empty(min(num_rows, N), wide, device=hidden.device)
        is_exact = dtype == padded.dtype
        group = max(num_rows, ROWS_PER_LOW_GROUP) if any(needs) and not is_exact else num_rows
        with torch.autocast(kind, enabled=False):
            if is_exact:
                low = weight
            else:  # zero rows pad the weight, so that all products have the padded width
                low = weight.new_empty(wide, weight.shape[1], dtype=dtype)
                low[:V], low[V:] = weight, 0
                low_group = low.new_empty(min(group, N), wide)  # logits, then their gradients, of a group of chunks
            for first in range(0, N, num_rows):
                some = slice(first, first + num_rows)
                x = hidden[some].to(dtype)
                chunk = padded[: len(x)]
                if is_exact:
                    torch.mm(x, low.T, out=chunk[:, :V])
                else:
                    low_chunk = low_group[first % group :][: len(x)]
                    chunk.copy_(torch.mm(x, low.T, out=low_chunk))
                chunk[:, V:] = -torch.inf
                if bias is not None:
                    chunk[:, :V] += bias
                with torch.set_grad_enabled(any(needs)):
                    leaf = chunk[:, :V].detach().requires_grad_(any(needs))
                    logits = rows.head.adapt(leaf)
                    logits.padded = chunk if logits is leaf else logits.detach()  # type: ignore[attr-defined]  # ours
                    total = rows.add(logits, some)
                if not any(needs):
                    continue
                (grad_logits,) = torch.autograd.grad(total, leaf)
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                if not is_exact:
                    low_chunk[:, :V], low_chunk[:, V:] = grad_logits, 0
                    grad_logits = low_chunk
                if grad_hidden is not None:
                    grad_hidden[some] = grad_logits @ low
                if grad_weight is not None and is_exact:  # beta 0: written, not read
                    grad_weight.addmm_(grad_logits.T, x, beta=float(first > 0))
                elif grad_weight is not None and (first % group + num_rows == group or some.stop >= N):
                    start = first - first % group
                    x = hidden[start : some.stop].to(dtype)
                    _add_product(grad_weight, low_group[: len(x)].T, x, is_first=start == 0)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        return rows.sums[0][""]

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the second gradient would lack the head's share
            raise RuntimeError("create_graph: this loss has no gradient of its gradient. Take it through full logits")
        if ctx.gradients is None:
            raise RuntimeError("a second backward pass through one loss: call next_token_loss once more for it")
        # scaled in place: a copy of the weight's gradient would be as large as the weight
        gradients = [gradient if gradient is None else gradient.mul_(grad_sum) for gradient in ctx.gradients]
        ctx.gradients = None
        return *gradients, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """Writes left @ right to `total` [V, D] float32 if `is_first`, else adds it. left [at least V, n] and right [n, D]
    have a lower precision. The product is made for some rows at a time, which fit a CPU's cache."""
    for rows in (slice(first, first + 4096) for first in range(0, len(total), 4096)):
        some = total[rows]
        product = left[rows][: len(some)] @ right
        some.copy_(product) if is_first else some.add_(product)


def check_result(result: Any, function: Callable, names: tuple[str, ...], differentiated: bool) -> None:
    """Raises TypeError or ValueError, with the reason, unless a loss returned (sum, ..., extras) as scalars, the sum
    with a gradient if it will be `differentiated`."""
    who, code = getattr(function, "__name__", repr(function)), getattr(function, "__code__", None)
    who += f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    if not isinstance(result, tuple) or len(result) != len(names):
        got = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise TypeError(f"{who} returned {got}. It must return {len(names)}: ({', '.join(names)})")
    if not isinstance(result[-1], dict):
        raise TypeError(f"{who}: the extras are a {type(result[-1]).__name__}. They must be a dict {{name: scalar}}")
    for name, value in {"the sum": result[0], **{f"the extra {n!r}": v for n, v in result[-1].items()}}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{who}: {name} is a {type(value).__name__}. It must be a tensor with one number")
        if value.dim() or not value.is_floating_point():
            found = f"shape {list(value.shape)} and {value.dtype}"
            raise ValueError(f"{who}: {name} has the {found}. It must be one float: sum it up")
    if differentiated and not result[0].requires_grad:
        raise ValueError(f"{who}: the sum has no gradient. It was not computed from the logits, or was detached")
