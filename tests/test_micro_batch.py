"""The micro-batch that fits into memory, found under a limit that makes real allocations fail."""

import contextlib
import json
import os
import resource
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, TINY, TWO, assert_same_run, run
from test_loop import train
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop.data.blocks import Split
from train_loop.main import main
from train_loop.micro_batch import fit_micro_batch
from train_loop.settings.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's address space is Linux's")


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


def test_a_micro_batch_that_fits_is_left_as_it_is_and_so_are_weights_and_random_states():
    model, split = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    settings = fit_micro_batch(model, split, settings_for(4), Accelerator(cpu=True))
    assert settings == settings_for(4)
    assert torch.equal(torch.get_rng_state(), random_state) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_run_that_looks_for_its_micro_batch_is_the_run_without_looking_where_it_fits(text_file, tmp_path):
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=4"]
    assert main([*arguments, f"--output_dir={tmp_path}/looked", "--auto_micro_batch"]) == 0
    assert main([*arguments, f"--output_dir={tmp_path}/plain"]) == 0
    assert_same_run(tmp_path / "looked", tmp_path / "plain")


def test_the_losses_are_the_same_with_the_micro_batch_that_fits(tmp_path):
    """Tolerance: sums in another order."""
    lines = []
    for micro_batch, accumulation in ((8, 1), (2, 4)):
        model, split = make()
        options = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        evaluated = Split("blocks", split.blocks[:2])
        lines.append(train(model, split, evaluated, tmp_path / str(micro_batch), max_train_steps=2, **options)[0])
    assert [a["loss"] for a in lines[0]] == pytest.approx([b["loss"] for b in lines[1]], rel=1e-5)


LIMITED = """
import json
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_micro_batch import fit_micro_batch, make, memory_left, settings_for
from train_loop.launch import build_accelerator

settings = settings_for(24)
accelerator = build_accelerator(settings)
model, split = make()
model = accelerator.prepare(model)
try:
    with memory_left({mebibytes}[accelerator.process_index]):
        settings = fit_micro_batch(model, split, settings, accelerator)
    found = [accelerator.process_index, settings.per_device_train_batch_size, settings.gradient_accumulation_steps]
except ValueError as error:
    found = [str(error)]
sys.stdout.write(json.dumps(found) + "\\n")  # at once: the processes share the pipe, and print writes the end apart
accelerator.end_training()
"""


def limited(mebibytes, tmp_path, launcher=(sys.executable,)):
    """What each process found, in new processes: one that ran before holds memory that it could use again."""
    script = tmp_path / "script.py"
    script.write_text(LIMITED.format(root=str(ROOT), tests=str(ROOT / "tests"), mebibytes=mebibytes))
    done = run(script, launcher=launcher, timeout=120)
    found = sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert len(found) == len(mebibytes), done.stderr
    return found


def test_a_smaller_one_is_found_with_the_same_blocks_in_a_step(tmp_path):
    ((_, micro_batch, accumulation),) = limited([450], tmp_path)
    assert micro_batch in (12, 6, 3) and micro_batch * accumulation == 48


def test_where_not_even_one_block_fits_it_is_said(tmp_path):
    ((message,),) = limited([40], tmp_path)
    assert message.startswith("not even one block of 128 tokens fits into memory")


def test_processes_divide_together_where_memory_runs_out_on_one_of_them_alone(tmp_path):
    (_, *first), (_, *second) = limited([8000, 450], tmp_path, TWO)
    assert first == second and first[0] < 24 and first[0] * first[1] == 48
