"""AdamW with decay on matrices only, and the learning rate as a function of the optimizer step."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train_loop.errors import UserError
from train_loop.settings import SCHEDULES, Settings

LINEAR = (torch.nn.Linear, Conv1D)  # Conv1D: GPT-2's name for a linear layer
MATRICES = (*LINEAR, torch.nn.Embedding)


def build_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.Optimizer:
    """AdamW in two groups: weights of linear layers and embeddings are decayed, biases and norms are not.

    With `settings.optimizer` "muon", a third group comes first: the weights of the hidden linear layers, with Muon.
    Module types decide the group, not names. Tied weights are one parameter and appear once. Raises UserError if
    "muon" finds no hidden linear layer.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, MATRICES)}
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden: list[torch.nn.Parameter] = []
    if settings.optimizer == "muon":
        linear = {id(module.weight) for module in model.modules() if isinstance(module, LINEAR)}
        linear -= {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
        hidden = [p for p in trained if id(p) in linear]
        if not hidden:
            raise UserError("optimizer muon: the model has no linear layer that is trained but its head. Give adamw")
    others = {id(p) for p in trained} - {id(p) for p in hidden}
    groups = [
        {"params": [p for p in trained if id(p) in others & matrices], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if id(p) in others - matrices], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,  # one pass over the weights; works on CPU and GPU
    )
    return Muon(hidden, settings.learning_rate, settings.weight_decay, adamw) if hidden else adamw


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of hidden layers, its first group, and AdamW for the others.

    Muon steps along the momentum of the gradient, with all its singular values set to about 1. The step is multiplied
    by 0.2 sqrt(longer side). It is then about as large as AdamW's, so both use the same rate and decay (Liu et al.
    2025, Muon is Scalable for LLM Training, arXiv:2502.16982, section 2.2). A transposed matrix, as in GPT-2's Conv1D,
    gets the transposed step. `torch.optim.Muon` works only in bfloat16: on a CPU without bfloat16 instructions a step
    takes twenty times as long.
    """

    def __init__(
        self,
        hidden: list[torch.nn.Parameter],
        lr: float,
        weight_decay: float,
        adamw: torch.optim.AdamW,
        momentum: float = 0.95,
    ) -> None:
        self.adamw = adamw
        group = {"params": hidden, "lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([group, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is called
        group, *others = self.param_groups
        for p in group["params"]:
            if p.grad is None:
                continue
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            update = orthogonal(p.grad.lerp(momentum, group["momentum"]))  # Nesterov: adds this step's gradient again
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * group["lr"])
        # set at each step: loading a checkpoint replaces this optimizer's groups and state
        self.adamw.param_groups, self.adamw.state = others, self.state
        self.adamw.step()


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix`, scaled to singular values s of at most 1, each of which is then moved to between 0.7 and 1.2. Values
    below a thousandth move only part of the way. Five Newton-Schulz steps, s <- a s + b s^3 + c s^5, use products only;
    a, b, c by Keller Jordan (https://kellerjordan.github.io/posts/muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = len(matrix) > matrix.shape[1]
    x = matrix.T if is_tall else matrix  # so that `square` has the size of the shorter side
    x = x / (x.norm() + 1e-7)  # the norm is at least the largest singular value
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def lr_factor(step: int, num_steps: int, settings: Settings) -> float:
    """The share of `settings.learning_rate` that the next optimizer step uses, after `step` of `num_steps` steps.

    A pure function. It gives the values of transformers' schedules of the same names; `wsd` (warm-up, stable, decay)
    is its `warmup_stable_decay` with a linear decay. `settings.SCHEDULES` lists the parameters of each schedule.
    """
    schedule = settings.lr_scheduler_type
    given = SCHEDULES[schedule] | (settings.lr_scheduler_kwargs or {})
    warmup = math.ceil(settings.num_warmup_steps * (num_steps if settings.num_warmup_steps < 1 else 1))
    if step < warmup and schedule != "constant":
        return step / warmup
    rest = max(1, num_steps - warmup)
    done, left = (step - warmup) / rest, max(0.0, (num_steps - step) / rest)  # shares of the steps after the warm-up
    factor = 1.0  # constant, constant_with_warmup
    if schedule == "linear":
        factor = left
    elif schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * given["num_cycles"] * 2 * done))
    elif schedule == "cosine_with_restarts":
        factor = 0.5 * (1 + math.cos(math.pi * (given["num_cycles"] * done % 1))) if left else 0.0
    elif schedule == "polynomial":
        factor = left ** given["power"]
    elif schedule == "wsd":
        factor = min(1.0, (num_steps - step) / min(rest, math.ceil(num_steps * given["decay_ratio"])))
    # the lowest learning rate, as a share of the highest
    low = given["lr_end"] / settings.learning_rate if "lr_end" in given else given.get("min_lr_ratio", 0.0)
    return factor * (1 - low) + low


def build_scheduler(optimizer: torch.optim.Optimizer, settings: Settings, num_steps: int, step: int = 0) -> LambdaLR:
    """The schedule of a run of `num_steps` optimizer steps that has taken `step` of them.

    Do not pass it to Accelerate's `prepare`, which would step it once for each process.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # LambdaLR multiplies it, and needs it when resuming
    return LambdaLR(optimizer, lambda done: lr_factor(done, num_steps, settings), last_epoch=step - 1)
