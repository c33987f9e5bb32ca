"""Checks before the first step: whether the loss is right, what fits into memory, and what a run costs.

loss_check.py   one block through the loss          micro_batch.py  the largest micro-batch that memory allows
plan.py         memory and time of a run (`--dry_run`)
"""

from train_loop.trial.loss_check import check_loss
from train_loop.trial.micro_batch import fit_micro_batch
from train_loop.trial.plan import Planned, print_plan

__all__ = ["Planned", "check_loss", "fit_micro_batch", "print_plan"]
