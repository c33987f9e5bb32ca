"""Mistakes that whoever changes the loop makes: each is said where it is made, not trained."""

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_CONFIGS, make_model, train
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop import loop, loss
from train_loop.cross_entropy import cross_entropy
from train_loop.data.blocks import Split
from train_loop.errors import UserError
from train_loop.loss import next_token_loss
from train_loop.settings.settings import Settings
from train_loop.trial import loss_check

LOOP = Path(loop.__file__)


@pytest.mark.parametrize(
    "line, said",
    [
        ("        optimizer.zero_grad()\n", r"gradients are left over: zero_grad\(\) is missing"),
        ("        position.move_to(window.end)\n", r"position\.move_to\(window\.end\) is missing"),
        ("        position.step += 1\n", r"step 0 is counted again: is position\.step \+= 1 missing"),
    ],
)
def test_a_line_that_is_lost_from_the_loop_is_missed_at_once(line, said, blocks, tmp_path, monkeypatch):
    source, edited = LOOP.read_text(encoding="utf-8"), types.ModuleType("edited")
    assert source.count(line) == 1
    exec(compile(source.replace(line, ""), LOOP, "exec"), vars(edited))
    monkeypatch.setattr(loop, "train", edited.train)
    with pytest.raises(AssertionError, match=said):
        train(make_model(), blocks, blocks[:2], tmp_path / "run")


def test_one_step_may_take_two_windows(blocks, tmp_path, monkeypatch):
    """The position is where the last of them ends."""
    plain = loop.windows_from

    def pairs(*arguments):
        windows = plain(*arguments)
        return ((next(windows), next(windows))[1] for _ in iter(int, 1))

    monkeypatch.setattr(loop, "windows_from", pairs)
    lines, _, _ = train(make_model(), blocks, blocks[:2], tmp_path / "run", max_train_steps=3)
    assert [line["epoch"] for line in lines] == pytest.approx([2 / 3, 4 / 3, 2.0], abs=1e-6)


def focal(nats):
    return (1 - torch.exp(-nats)) ** 2 * nats


OBJECTIVES = {
    "sum": lambda nats: nats.sum(),
    "focal sum": lambda nats: focal(nats).sum(),
    "mean": lambda nats: nats.mean(),
    "focal mean": lambda nats: focal(nats).mean(),
    "smaller mean": lambda nats: 0.01 * nats.mean(),
}


@pytest.mark.parametrize("length", [16, 600])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_mean_is_told_from_a_sum_whatever_the_objective_and_the_blocks_length(name, length, blocks, monkeypatch):
    """A block of 600 tokens is more than one chunk of rows, and so its objective the sum of several means."""
    sizes = {**TINY_CONFIGS["gpt2"], "n_positions": 600}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=97, **sizes), dtype=torch.float32)
    long = np.tile(blocks.reshape(-1), 2)[:length][None]
    monkeypatch.setattr(
        loss, "objective", lambda logits, targets, **of_rows: (OBJECTIVES[name](cross_entropy(logits, targets)), {})
    )
    remarks = " ".join(loss_check.check_loss(model, Split("blocks", long), Settings(), Accelerator(cpu=True)))
    assert ("A sum would double. If loss.py returns a mean, return a sum" in remarks) == ("mean" in name)


def test_a_mean_that_next_token_loss_returns_is_told_too(blocks, monkeypatch):
    def mean(model, batch):
        total, num_targets, extras = next_token_loss(model, batch)
        return total / num_targets, num_targets, extras

    monkeypatch.setattr(loss_check, "next_token_loss", mean)
    found = loss_check.check_loss(make_model(), Split("blocks", blocks), Settings(), Accelerator(cpu=True))
    assert "A sum would double" in found[1]


@pytest.mark.parametrize("full", [False, True])
def test_a_gradient_penalty_is_an_error_and_not_a_part_of_its_gradient(full, blocks):
    model, ids = make_model(), torch.from_numpy(blocks[:2].astype("int64"))
    if full:
        total = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).sum()
    else:
        total = next_token_loss(model, {"input_ids": ids, "labels": ids})[0]
    with pytest.raises(RuntimeError, match=r"create_graph: .* no gradient of its gradient"):
        torch.autograd.grad(total, model.transformer.ln_f.weight, create_graph=True)


def test_a_loss_that_its_code_makes_nan_later_on_does_not_blame_the_learning_rate_alone(blocks, tmp_path, monkeypatch):
    def objective(logits, targets, step=0, **of_rows):
        return cross_entropy(logits, targets).sum() * (math.nan if step == 2 else 1), {}

    monkeypatch.setattr(loss, "objective", objective)
    with pytest.raises(UserError, match=r"step 3: .*If you changed loss\.py, look there for log, sqrt or a division"):
        train(make_model(), blocks, blocks[:2], tmp_path / "run")
