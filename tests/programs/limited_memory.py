"""Looks for the micro-batch that fits, in a process that may take only so many MiB more: one number per process, as a
JSON list. Prints [rank, micro-batch, accumulation], or [message] where none fits.

The parts are imported by tests/test_micro_batch.py too.
"""

import contextlib
import json
import os
import resource
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop.data import Split
from train_loop.errors import UserError
from train_loop.machine.launch import build_accelerator
from train_loop.settings import Settings
from train_loop.trial.micro_batch import fit_micro_batch


@contextlib.contextmanager
def memory_left(mebibytes):
    """Within it, this process may take that much more address space."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + mebibytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def make(num_blocks=48):
    """A model whose activations take about 50 MiB a block of 256 tokens, and blocks for it."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 97, "n_layer": 4, "n_embd": 128, "n_head": 8, "n_positions": 256}
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    config = AutoConfig.for_model("gpt2", attn_implementation="eager", **sizes, **dropout)
    blocks = np.random.default_rng(0).integers(97, size=(num_blocks, 256), dtype=np.int32)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), Split("blocks", blocks)


def settings_for(micro_batch, accumulation=2):
    return Settings(
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation, output_dir="unused"
    )


def find(mebibytes):
    settings = settings_for(24)
    accelerator = build_accelerator(settings)
    model, split = make()
    model = accelerator.prepare(model)
    try:
        with memory_left(mebibytes[accelerator.process_index]):
            settings = fit_micro_batch(model, split, settings, accelerator)
        found = [accelerator.process_index, settings.per_device_train_batch_size, settings.gradient_accumulation_steps]
    except UserError as error:
        found = [str(error)]
    # at once: the processes share the pipe, and print writes the line's end apart
    sys.stdout.write(json.dumps(found) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    find(json.loads(sys.argv[1]))
