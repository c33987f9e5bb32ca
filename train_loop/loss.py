"""The objective: a plain function, called for training and evaluation alike. Change it here.

B: blocks in a micro-batch, T: tokens of a block, N: positions that predict a token, D: width of the model,
V: vocabulary.
"""

import contextlib

import torch
import torch.nn.functional as F

from train_loop.data import IGNORED

ROWS_PER_CHUNK = {"cpu": 256}  # rows of logits at once: more need more memory, and gain nothing
ROWS_PER_CHUNK_ELSEWHERE = 2048


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
    causal_lm = getattr(model, "module", model)  # DDP's wrapper has the model inside
    if getattr(causal_lm, "loss_in_head", False):
        with loss_in_head(causal_lm.get_output_embeddings(), labels):
            nll_sum = model(**inputs, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        nll_sum = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    return nll_sum, count_targets(labels), {}


@contextlib.contextmanager
def loss_in_head(head, labels):
    """Within it the model's last layer, the linear `head`, gives the sum of nats where it would give logits: the model
    itself is called as ever, so DDP, FSDP, autocast and hooks see nothing new, and no logits [B, T, V] are held."""

    def forward(hidden):  # [B, T, D]
        hidden, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        bias = getattr(head, "bias", None)
        return LinearCrossEntropy.apply(hidden, head.weight, bias, targets, torch.is_grad_enabled())

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T + bias)[target] over the rows, in nats, as a float32 scalar.

    hidden [N, D], weight [V, D], bias [V] or None, targets [N] (-100: none). A chunk of rows at a time: its logits
    become its share of the loss and at once of the gradients, which wait for the backward pass. So logits are never
    held for more than a chunk nor worked out twice. torch's own `linear_cross_entropy` does the same, but its sum is
    bfloat16 under autocast, and on a CPU it takes a tenth longer where the vocabulary is odd, as GPT-2's is.
    Products are taken in autocast's precision, as a linear layer's would be; everything else is float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, with_gradients):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        needs = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        # float32 also where weights are bfloat16 (FSDP): a sum of many chunks would stop growing in it
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None

        V, num_rows = len(weight), ROWS_PER_CHUNK.get(kind, ROWS_PER_CHUNK_ELSEWHERE)
        # rows of logits begin on a cache line's boundary: matrix products are up to 1.4 times as fast there on a CPU
        padded = torch.empty(min(num_rows, len(hidden)), -(-V // 64) * 64, device=hidden.device)
        nll_sum = torch.zeros((), device=hidden.device)
        with torch.autocast(kind, enabled=False):
            low = weight.to(dtype)
            for first in range(0, len(hidden), num_rows):
                rows = slice(first, first + num_rows)
                x, target = hidden[rows].to(dtype), targets[rows, None]
                is_target = target != IGNORED
                target = target.clamp(min=0)
                chunk = padded[: len(x)]
                logits, chunk[:, V:] = chunk[:, :V], -torch.inf
                if dtype == chunk.dtype:
                    torch.mm(x, low.T, out=logits)
                else:
                    logits.copy_(x @ low.T)
                if bias is not None:
                    logits += bias
                # written over the logits on a CPU, where memory is what costs
                log_p = torch.log_softmax(chunk, -1, out=chunk if kind == "cpu" else None)
                nll_sum -= (log_p.gather(1, target) * is_target).sum()
                if not any(needs):
                    continue
                grad_logits = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=log_p.dtype))
                grad_logits = grad_logits[:, :V].to(dtype)  # softmax - one-hot; rows without a target: see below
                if needs[0]:
                    grad_hidden[rows] = (grad_logits @ low) * is_target
                if needs[1] and dtype == grad_weight.dtype:  # beta 0: written, not added to, and not read before
                    grad_weight.addmm_(grad_logits.T, x * is_target, beta=float(first > 0))
                elif needs[1]:
                    product = grad_logits.T @ (x * is_target)
                    grad_weight = grad_weight.add_(product) if first else grad_weight.copy_(product)
                if grad_bias is not None:
                    grad_bias += (grad_logits * is_target).sum(0)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        return nll_sum

    @staticmethod
    def backward(ctx, grad_nll_sum):
        # scaled in place: a copy of the weight's gradient would be as large as the weight
        gradients = [gradient if gradient is None else gradient.mul_(grad_nll_sum) for gradient in ctx.gradients]
        ctx.gradients = ()  # a second backward pass fails, instead of scaling them twice
        return *gradients, None, None


def put_loss_in_head(model):
    """Sets `model.loss_in_head`, whether `next_token_loss` may work without logits, and returns it.

    Tried out, not looked up: on a small batch the loss must come out as through the logits, without gradients and with
    them. It does not where a model does something to its logits afterwards (a soft cap, a scale), nor where the
    objective was changed above, for logits, and not in `LinearCrossEntropy`.
    """
    ids = torch.arange(14, device=model.device).view(2, 7) * 7 % model.get_input_embeddings().num_embeddings
    was_training = model.training
    model.eval()
    try:
        nll_sums = []
        for model.loss_in_head in (False, True):
            for with_gradients in (False, True):
                with torch.set_grad_enabled(with_gradients):
                    nll_sums.append(next_token_loss(model, {"input_ids": ids, "labels": ids})[0].detach())
        model.loss_in_head = torch.allclose(torch.stack(nll_sums[:2]), torch.stack(nll_sums[2:]), rtol=1e-5)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # whatever the model did with a scalar
        model.loss_in_head = False
    finally:
        model.train(was_training)
    return model.loss_in_head
