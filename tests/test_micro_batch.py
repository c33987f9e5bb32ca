"""The micro-batch that fits into memory, found under a limit that makes real allocations fail."""

import json
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import PROGRAMS, TINY, assert_same_run, train
from forks import forked
from programs.limited_memory import make, settings_for

from train_loop.data.blocks import Split
from train_loop.main import main
from train_loop.trial.micro_batch import fit_micro_batch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's address space is Linux's")


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


def limited(*mebibytes):
    """What each process found, in new processes: one that ran before holds memory that it could use again."""
    done = forked(PROGRAMS / "limited_memory.py", json.dumps(mebibytes), processes=len(mebibytes))
    found = sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert len(found) == len(mebibytes), done.stderr
    return found


def test_a_smaller_one_is_found_with_the_same_blocks_in_a_step():
    ((_, micro_batch, accumulation),) = limited(450)
    assert micro_batch in (12, 6, 3) and micro_batch * accumulation == 48


def test_if_not_even_one_block_fits_an_error_says_so():
    ((message,),) = limited(40)
    assert message.startswith("not even one block of 128 tokens fits into memory")


def test_processes_divide_together_where_memory_runs_out_on_one_of_them_alone():
    (_, *first), (_, *second) = limited(8000, 450)
    assert first == second and first[0] < 24 and first[0] * first[1] == 48
