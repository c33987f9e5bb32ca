"""AdamW with decay on matrices only, and the learning rate as a function of the optimizer step."""

import torch
from transformers import get_scheduler
from transformers.pytorch_utils import Conv1D

MATRICES = (torch.nn.Linear, torch.nn.Embedding, Conv1D)  # Conv1D: GPT-2's name for a linear layer


def build_optimizer(model, settings):
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


def move_scheduler(scheduler, step):
    """Sets the schedule to where it is after `step` optimizer steps: it is a function of the step alone."""
    scheduler.last_epoch, scheduler._step_count = step - 1, step + 1
    scheduler.step()


def build_scheduler(optimizer, settings, num_steps):
    """The schedule of `num_steps` optimizer steps. Not to be passed through Accelerate's `prepare`, which would step
    it once for each process."""
    return get_scheduler(settings.lr_scheduler_type, optimizer, settings.num_warmup_steps, num_steps)
