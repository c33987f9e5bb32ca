"""The largest micro-batch that memory allows (`--auto_micro_batch`), found before the first step."""

import dataclasses
import gc

import torch
from accelerate import Accelerator

from train_loop.data import TrainingData, Windows
from train_loop.errors import UserError
from train_loop.loss import next_token_loss
from train_loop.machine import is_out_of_memory
from train_loop.settings import Settings


def fit_micro_batch(
    model: torch.nn.Module, split: TrainingData, settings: Settings, accelerator: Accelerator
) -> Settings:
    """`settings` with a micro-batch that fits into the memory of every process. Accumulation grows to match: the blocks
    of an optimizer step stay the same and, with dropout off, so do the losses.

    A try is one forward and backward pass beside the optimizer's two moments. If a process runs out of memory, all of
    them divide the micro-batch by its smallest prime factor. Weights and random states do not change. Processes
    exchange nothing during a try, so a failure of one blocks no other. Under FSDP they do, and a failure of one alone
    ends in a time-out. On CPUs this works only if a limit makes allocations fail: the kernel's out-of-memory killer
    cannot be caught.

    Raises UserError if not even one block fits.
    """
    size, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    while True:
        num_fitting = accelerator.reduce(torch.tensor(_fits(model, split, size, accelerator)).to(accelerator.device))
        if num_fitting == accelerator.num_processes:
            break
        if size == 1:
            raise UserError(f"not even one block of {settings.block_size} tokens fits into memory: lower block_size")
        factor = next(f for f in range(2, size + 1) if size % f == 0)
        size, accumulation = size // factor, accumulation * factor
    return dataclasses.replace(settings, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)


def trial_batch(split: TrainingData, num_blocks: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A micro-batch of the first `num_blocks` training blocks, repeated from the first if there are fewer:
    {"input_ids", "labels", ...}, each [num_blocks, T]."""
    blocks = torch.arange(num_blocks).numpy() % len(split.blocks)
    window = Windows(split.blocks, blocks, num_blocks, 1, documents_apart=split.documents_apart)[0]
    return {name: value[0].to(device) for name, value in window.items()}


def _fits(model: torch.nn.Module, split: TrainingData, micro_batch_size: int, accelerator: Accelerator) -> int:
    """1 if a micro-batch fits, 0 if not."""
    model.train()
    moments = []
    try:
        with torch.random.fork_rng(), accelerator.no_sync(model):
            moments += [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
            batch = trial_batch(split, micro_batch_size, accelerator.device)
            accelerator.backward(next_token_loss(model, batch)[0])
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 0
    finally:
        model.zero_grad(set_to_none=True)
        moments.clear()
        gc.collect()  # an exception's frames hold tensors
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
