"""Cross entropy of logits in little memory, which an objective may call (`loss.py`). N: rows, V: vocabulary."""

from typing import Any

import torch
from torch import Tensor

from train_loop.data import IGNORED


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, inplace: bool = False) -> Tensor:
    """-log softmax(logits)[target] of each row in nats, [N], 0 where the target is -100. Differentiable, once.

    `logits` [N, V], `targets` [N]; `label_smoothing` as in torch. `inplace` overwrites the logits' memory: one chunk
    of logits less is held, and the head takes up to 5 % less time on a CPU. Use it only if nothing else uses the
    logits: afterwards they are NaN, so that such a use is noticed.
    """
    padded = getattr(logits, "padded", None)
    inplace = inplace and padded is not None  # only the logits that head.py hands out may be overwritten
    nats = _CrossEntropy.apply(logits, logits.detach() if padded is None else padded, targets, label_smoothing, inplace)
    if inplace:
        logits.data = logits.new_full((1, 1), torch.nan).expand(logits.shape)
    return nats


class _CrossEntropy(torch.autograd.Function):
    """`padded` [N, at least V] holds the logits, then -inf. The buffer of its log-softmax becomes the gradient;
    `F.cross_entropy` would need one more buffer."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, padded: Tensor, targets: Tensor, smoothing: float, inplace: bool) -> Tensor:
        ctx.smoothing, ctx.num_logits = smoothing, logits.shape[1]
        ctx.is_target, ctx.targets = targets != IGNORED, targets.clamp(min=0)[:, None]
        # on a GPU a new tensor is as fast
        ctx.log_p = torch.log_softmax(padded, -1, out=padded if inplace and padded.device.type == "cpu" else None)
        log_p = ctx.log_p.gather(1, ctx.targets)[:, 0]
        if smoothing:
            log_p = torch.lerp(log_p, ctx.log_p[:, : ctx.num_logits].mean(1), smoothing)
        return -(log_p * ctx.is_target)

    @staticmethod
    def backward(ctx: Any, grad_nats: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph: cross_entropy has no gradient of its gradient, F.cross_entropy has one")
        grad, ctx.log_p = ctx.log_p, None
        if grad is None:
            raise RuntimeError("cross_entropy can be differentiated once: its memory became the gradient")
        on_target = torch.full_like(ctx.targets, ctx.smoothing - 1, dtype=grad.dtype)
        grad = grad.exp_().scatter_add_(1, ctx.targets, on_target)[:, : ctx.num_logits]  # softmax - one-hot
        if ctx.smoothing:
            grad -= ctx.smoothing / ctx.num_logits
        grad_nats = (grad_nats * ctx.is_target)[:, None]
        if grad.device.type != "cpu" or not (grad_nats == 1).all():  # this test would wait for a GPU
            grad *= grad_nats
        return grad, None, None, None, None
