"""The arithmetic of a run, printed before it begins."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from train_loop.errors import num_of
from train_loop.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from train_loop.data import Split, TrainingData


def banner(
    settings: Settings,
    accelerator: Accelerator,
    model: PreTrainedModel,
    eval_splits: Mapping[str, Split],
    held_out: str,
    train_split: TrainingData | None = None,
    steps_per_epoch: int | None = None,
    num_steps: int | None = None,
) -> str:
    """The arithmetic of the run, a line each. Without a `train_split`, it is of an evaluation."""
    import torch  # imported here: `compare`, which only draws, need not wait for it

    s, world_size = settings, accelerator.num_processes
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained = f", {num_trained:,} of them trained" if num_trained < num_parameters else ""
    source = s.model_name_or_path or ("from scratch" + (f", shaped as {s.config_name}" if s.config_name else ""))
    lines = [f"model       {source}: {model.config.model_type}, {num_parameters:,} parameters{trained}, float32"]
    if train_split:
        for i, line in enumerate(train_split.summary().split("\n")):
            lines.append(f"{'' if i else 'training':<12}{line}")
    for i, (name, split) in enumerate(eval_splits.items()):
        label = "" if i else "validation"
        lines.append(f"{label:<12}{f'{name}: ' if len(eval_splits) > 1 else ''}{split.summary()}")
    if train_split and len(eval_splits) > 1:
        first = next(iter(eval_splits))
        lines.append(f"best        {first}, the first set, decides about the best model and early stopping")
    if held_out:
        lines.append(f"held out    {held_out}")
    if s.trust_remote_code:
        origin = s.model_name_or_path or s.config_name
        lines.append(f"trusted     Python code that comes with {origin} is run (trust_remote_code)")
    if train_split and num_steps:
        blocks = s.blocks_per_step(world_size)
        num_taken = train_split.blocks_in_epoch(s)
        if num_taken != train_split.num_blocks:
            lines.append(f"epoch       {num_taken:,} of {train_split.num_blocks:,} blocks (block_order), none twice")
        lines += [
            f"batch       micro-batch {s.per_device_train_batch_size} x accumulation {s.gradient_accumulation_steps} x "
            f"processes {world_size} = {num_of(blocks, 'block')} = {blocks * s.block_size:,} tokens",
            f"steps       {steps_per_epoch:,} per epoch x {num_steps / steps_per_epoch:.2f} epochs = {num_steps:,}"
            if steps_per_epoch
            else f"steps       {num_steps:,} (max_train_steps); the length of an epoch is known at its end",
        ]
    lines.append(
        f"device      {accelerator.device.type}, precision {accelerator.mixed_precision.replace('no', 'float32')}, "
        f"world size {world_size}, {num_of(torch.get_num_threads(), 'CPU thread')} each"
    )
    wrap = textwrap.TextWrapper(80, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrap.fill, lines))
