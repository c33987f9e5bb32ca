"""AdamW with decay on matrices only, and the learning rate as a function of the optimizer step."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.pytorch_utils import Conv1D

from train_loop.settings import SCHEDULES, Settings

MATRICES = (torch.nn.Linear, torch.nn.Embedding, Conv1D)  # Conv1D: GPT-2's name for a linear layer


def build_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW in two groups: weights of linear layers and embeddings are decayed, biases and norms are not.

    Chosen by the type of the module, not by names. Tied weights are one parameter, and so come once.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, MATRICES)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,  # one pass over the weights; works on CPU and GPU
    )


def lr_factor(step: int, num_steps: int, settings: Settings) -> float:
    """The share of `settings.learning_rate` with which the next optimizer step is taken, after `step` of `num_steps`.

    A pure function. It gives the values of transformers' schedules of the same names; `wsd` (warm-up, stable, decay)
    is its `warmup_stable_decay` with a linear decay. `settings.SCHEDULES` lists the parameters of each schedule.
    """
    schedule = settings.lr_scheduler_type
    given = SCHEDULES[schedule] | (settings.lr_scheduler_kwargs or {})
    warmup = settings.num_warmup_steps or math.ceil(num_steps * settings.warmup_ratio)
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

    Not to be passed through Accelerate's `prepare`, which would step it once for each process.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # what LambdaLR multiplies, and needs where it begins later on
    return LambdaLR(optimizer, lambda done: lr_factor(done, num_steps, settings), last_epoch=step - 1)
