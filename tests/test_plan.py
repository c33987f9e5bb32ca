"""--dry_run: the arithmetic against hand-counted numbers, and what it leaves: nothing."""

import re

import pytest
import torch
from conftest import LAUNCH, TINY, run
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop.main import main
from train_loop.trial.plan import LiveBytes, bytes_exchanged, state_bytes


@pytest.fixture(scope="module")
def model():
    config = AutoConfig.for_model("gpt2", vocab_size=11, n_positions=16, n_embd=8, n_head=2, n_layer=3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


# by hand. A layer: ln_1 8 + 8, c_attn 8 x 24 + 24, c_proj 8 x 8 + 8, ln_2 8 + 8, c_fc 8 x 32 + 32, c_proj 32 x 8 + 8
LAYER = 16 + 216 + 72 + 16 + 288 + 264
# wte 11 x 8, which is the head, too; wpe 16 x 8; ln_f 8 + 8
OUTSIDE = 88 + 128 + 16
P = 3 * LAYER + OUTSIDE


def test_the_state_of_a_small_gpt2_is_as_counted_by_hand(model):
    assert state_bytes(model) == {"weights": 4 * P, "gradients": 4 * P, "optimizer": 8 * P, "exchange": 0}
    assert state_bytes(model, 2)["exchange"] == 4 * P  # DDP's buckets
    model.transformer.wpe.weight.requires_grad_(False)
    assert state_bytes(model)["optimizer"] == 8 * (P - 128)
    model.transformer.wpe.weight.requires_grad_(True)


def test_shares_are_rows_rounded_up_and_layers_in_use_are_unsharded(model):
    share = (P - 88) // 2 + 6 * 8  # of 11 rows of wte one process has 6
    at_work = OUTSIDE + 2 * LAYER
    assert state_bytes(model, 2, sharded=True) == {
        "weights": 4 * share,
        "gradients": 4 * share,
        "optimizer": 8 * share,
        "exchange": 4 * at_work,
    }
    assert state_bytes(model, 2, sharded=True, accumulates=True)["gradients"] == 4 * P


def test_what_is_exchanged_is_the_least_possible(model):
    assert bytes_exchanged(model, 4, sharded=False, accumulation=3) == 2 * 3 / 4 * 4 * P
    assert bytes_exchanged(model, 4, sharded=True, accumulation=3) == (2 * 3 + 1) * 3 / 4 * 4 * P
    assert bytes_exchanged(model, 4, sharded=True, accumulation=3, half=True) == (3 + 1) * 3 / 4 * 4 * P
    assert bytes_exchanged(model, 1, sharded=False, accumulation=3) == 0


def test_live_bytes_are_those_of_tensors_not_yet_freed():
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes(weight) as counted:
        a = torch.zeros(500)  # 2,000 bytes
        view = a[:10]
        a.add_(1)
        assert counted.live == 2000
        del a
        assert counted.live == 2000, "the view keeps it"
        del view
        assert (counted.live, counted.peak) == (0, 2000)
        loss = (weight * 2).exp().sum()  # exp is kept for the backward pass, the product is not
        assert counted.live == 4000 + 4
        loss.backward()
    assert counted.live == 4000 + 4  # the gradient, the loss


def plan(output):
    """{label: text} of its lines."""
    return {line[:12].strip(): line[12:] for line in output.splitlines() if re.match(r"[a-z]+ +", line[:12])}


def test_a_plan_leaves_nothing_and_an_earlier_run_as_it_was(text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, f"--train_file={text_file}", f"--output_dir={tmp_path}/run", "--gradient_accumulation_steps=3"]
    assert main([*arguments, "--dry_run"]) == 0
    lines = plan(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert {"state", "activations", "memory", "measured", "time", "total", "limit"} < lines.keys()
    # 3 epochs of 100 blocks of 31 targets, 24 blocks to a step; an evaluation at the start and after each epoch
    assert lines["total"].startswith("15 steps, 9,300 target tokens") and "4 evaluations" in lines["total"]
    assert lines["limit"] == "compute"

    assert main([*arguments, "--max_train_steps=1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main([*arguments, "--dry_run", "--overwrite_output_dir"]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_micro_batch_that_exceeds_memory_is_reported_and_not_tried(text_file, tmp_path, capsys):
    arguments = [*TINY, f"--train_file={text_file}", f"--output_dir={tmp_path}/run", "--dry_run"]
    assert main([*arguments, "--per_device_train_batch_size=100000000"]) == 0
    lines = plan(capsys.readouterr().out)
    assert lines["limit"].startswith("memory: the micro-batch does not fit") and "measured" not in lines


def test_two_processes_plan_with_the_shares_that_the_launch_config_asks_for(text_file, tmp_path):
    """Without a GPU the steps themselves run as DDP, and a sentence says so."""
    arguments = [*TINY, f"--train_file={text_file}", f"--output_dir={tmp_path}/run", "--dry_run"]
    config = ("--config_file", "launch_configs/fsdp.yaml", "--num_processes=2", "--mixed_precision=no")
    done = run("train_loop/main.py", *arguments, launcher=(*LAUNCH, *config))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: the launch config asks for FSDP") == 1
    lines = plan(done.stdout)
    # 300 x 32 + 64 x 32 + 12 x 32² + 13 x 32 + 2 x 32 parameters, 24,416: all rows are even
    assert lines["state"].startswith("of a process (FSDP over 2): weights 0.0 MB") and "24,416 par" in lines["state"]
    assert "of a step's time" in lines["limit"] and list(tmp_path.iterdir()) == []
