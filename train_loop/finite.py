"""What happens when a loss or a gradient norm is not finite: the step is not taken, and the run stops."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from train_loop.checkpoint import Checkpoints
from train_loop.errors import UserError

SMALLEST_SCALE = 2.0**-20  # gradients that overflow below it are not finite at any scale


class FiniteGuard:
    """Protects the weights from a step that is not finite, and raises UserError on all processes alike.

    On a CPU, with float16's scaler, and with an optimizer that is not fused, the numbers are checked before each step.
    Elsewhere this check would make the host wait for the device at each step. There the device itself makes the fused
    optimizer skip every step from the first bad one on, and the host checks the numbers where it waits anyway: before a
    line is logged, before an evaluation, before a save.
    """

    def __init__(self, optimizer: AcceleratedOptimizer, accelerator: Accelerator, checkpoints: Checkpoints) -> None:
        self.optimizer, self.scaler, self.checkpoints = optimizer, accelerator.scaler, checkpoints
        can_hold_still = all(group.get("fused") for group in optimizer.param_groups)
        self.waits = accelerator.device.type == "cpu" or self.scaler is not None or not can_hold_still
        self.first = torch.zeros(3, device=accelerator.device)  # of the first bad step: step, loss, norm

    def check(self, step: int, nll_sum: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Called before the optimizer's step. Both numbers are the same on every process."""
        # with float16's scaler an infinite gradient is expected: the scaler skips that step and halves its scale
        overflow_is_fine = self.scaler is not None and self.scaler.get_scale() > SMALLEST_SCALE
        checked = nll_sum if overflow_is_fine else nll_sum + grad_norm
        now = torch.stack([torch.full_like(checked, step), nll_sum, grad_norm])
        self.first = torch.where(torch.isfinite(checked) | (self.first[0] > 0), self.first, now)
        if self.waits:
            self.look()
        else:
            # the name by which torch's GradScaler tells a fused optimizer to take no step (1); it is not documented. A
            # torch without it would take the step, but the run stops all the same, before anything is saved
            self.optimizer.optimizer.found_inf = (self.first[0] > 0).float()

    def look(self) -> None:
        """Raises UserError if a step was not finite."""
        step, nll_sum, grad_norm = self.first.tolist()
        if step:
            raise UserError(
                f"step {step:.0f}: the loss ({nll_sum} nats) or the gradient norm ({grad_norm}) is not finite; "
                f"the step was not taken, and {self.checkpoints.say_latest()}. {self._advice(step - 1)}"
            )

    def check_evaluation(self, step: int, evaluation: dict[str, Any]) -> None:
        """Raises UserError if a loss of the evaluation after `step` optimizer steps is not finite."""
        for name, value in evaluation.items():
            if name.endswith("loss") and not math.isfinite(value):
                raise UserError(
                    f"after step {step}: {name} is {value}, which is not finite; the run stops, and "
                    f"{self.checkpoints.say_latest()}. {self._advice(step)}"
                )

    def _advice(self, num_updates: float) -> str:
        if num_updates:
            return (
                "Try a lower learning_rate or more num_warmup_steps. If you changed loss.py, look there for log, sqrt "
                "or a division at 0"
            )
        return "The weights were not updated yet: check loss.py, the training and validation data, the model's weights"
