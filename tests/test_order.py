"""The order of an epoch's blocks is checked, and its length is the epoch's; windows say where they end."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_run, copy_until, lines_of, make_model, train

from train_loop.data import blocks as data
from train_loop.data.blocks import Split
from train_loop.errors import UserError
from train_loop.main import main
from train_loop.position import Place, Position
from train_loop.settings.settings import Settings

pytestmark = pytest.mark.quick

ALONE = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"), is_main_process=True)
plain_order = data.block_order


def two_thirds(blocks, seed, epoch):
    return plain_order(blocks, seed, epoch)[: len(blocks) * 2 // 3]


def test_an_epoch_is_as_long_as_its_order_and_the_banner_says_so(text_file, tmp_path, monkeypatch, capsys):
    """66 of 100 blocks, 8 a step: 9 steps an epoch. Resumed within the second one it ends as if left alone."""
    monkeypatch.setattr(data, "block_order", two_thirds)
    arguments = [*TINY, f"--train_file={text_file}", "--num_train_epochs=2", "--checkpointing_steps=6"]
    arguments += ["--checkpoints_total_limit=9"]
    assert main([*arguments, f"--output_dir={tmp_path}/alone"]) == 0
    banner = capsys.readouterr().out
    assert re.search(r"^epoch +66 of 100 blocks \(block_order\), none twice$", banner, re.M)
    assert re.search(r"^steps +9 per epoch x 2.00 epochs = 18$", banner, re.M)
    evaluations = [(line["step"], line["epoch"]) for line in lines_of(tmp_path / "alone") if "eval_loss" in line]
    assert evaluations == [(0, 0.0), (9, 1.0), (18, 2.0)]
    copy_until(12, tmp_path / "alone", tmp_path / "resumed")
    assert main([*arguments, f"--output_dir={tmp_path}/resumed", "--resume_from_checkpoint=auto"]) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "alone")


@pytest.mark.parametrize(
    "order, said",
    [
        (
            [0, 1, 2, 1, 1, 0],
            "names block 1 3 times, and 2 blocks more than once. An epoch takes each block at most once",
        ),
        ([0, 22], "names block 22, but there are blocks 0 to 21"),
        ([3, -1], "names block -1, but there are blocks 0 to 21"),
        ([0.0, 1.0], "must give the indices of blocks, but gave float64 of shape (2,)"),
        ([[0], [1]], "must give the indices of blocks, but gave int64 of shape (2, 1)"),
        ([], "must give the indices of blocks, but gave float64 of shape (0,)"),
    ],
)
def test_an_order_that_cannot_be_is_an_error_that_names_function_and_epoch(order, said, blocks, tmp_path, monkeypatch):
    """It comes from whoever changed the function, so the error keeps its traceback."""
    monkeypatch.setattr(data, "block_order", lambda blocks, seed, epoch: order)
    with pytest.raises(ValueError) as error:
        train(make_model(), blocks, blocks[:2], tmp_path / "run")
    assert str(error.value).startswith("block_order (train_loop/data/blocks.py), epoch 0: it ") and said in str(
        error.value
    )
    assert not isinstance(error.value, UserError)


def test_an_order_that_goes_wrong_later_is_found_when_its_epoch_begins(blocks, tmp_path, monkeypatch):
    later = lambda blocks, seed, epoch: plain_order(blocks, seed, epoch) if epoch < 1 else np.zeros(22, dtype=int)  # noqa: E731
    monkeypatch.setattr(data, "block_order", later)
    with pytest.raises(ValueError, match="epoch 1: it names block 0 22 times"):
        train(make_model(), blocks, blocks[:2], tmp_path / "run", num_train_epochs=2.0)


def test_an_epoch_of_a_different_length_is_reported_and_counted_with_its_own_length(
    blocks, tmp_path, monkeypatch, capsys
):
    """22 blocks, then 10: three steps and two. The run has the six steps that two epochs like the first have."""
    monkeypatch.setattr(
        data, "block_order", lambda blocks, seed, epoch: plain_order(blocks, 1, 1)[: 10 if epoch else 22]
    )
    lines, _, _ = train(make_model(), blocks, blocks[:2], tmp_path / "run", num_train_epochs=2.0)
    assert "epoch 2 has 2 optimizer steps, the one before it 3: the number of steps" in capsys.readouterr().err
    assert [line["epoch"] for line in lines] == [round(step / 3, 6) for step in (1, 2, 3)] + [1.5, 2.0, 2.5]


def test_each_window_says_where_it_ends_and_from_there_come_the_others(blocks):
    split, settings = Split("training", blocks), Settings(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    start = Place(epoch=1)
    whole = list(split.windows(start, settings, ALONE))
    assert start == Place(epoch=1), "the place that was given is not moved"
    assert [window.end for window in whole] == [Place(1, number, per_epoch=6) for number in range(1, 7)]
    for number, window in enumerate(whole, start=1):
        rest = list(split.windows(window.end, settings, ALONE))
        assert [later.end for later in rest] == [later.end for later in whole[number:]]
        for got, wanted in zip(rest, whole[number:], strict=True):
            assert all(torch.equal(got.tensors[name], wanted.tensors[name]) for name in wanted.tensors)


def test_a_position_moves_through_the_data_and_keeps_its_counts():
    position = Position(epoch=1, window=4, step=10, num_worse=2)
    position.move_to(Place(2, 1, per_epoch=5, stream={"token": 3}))
    assert position == Position(2, 1, 5, {"token": 3}, step=10, num_worse=2)


def test_a_position_with_a_removed_field_is_refused_and_a_new_field_is_reported(capsys):
    values = json.loads(json.dumps(dataclasses.asdict(Position(epoch=2, step=30))))
    assert Position.from_dict(values) == Position(epoch=2, step=30) and capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"position holds my_count, but Position has no such field: .*position\.py"):
        Position.from_dict({**values, "my_count": 3})
    del values["num_worse"]
    assert Position.from_dict(values, is_main=False) == Position(epoch=2, step=30)
    assert capsys.readouterr().err == ""
    assert Position.from_dict(values) == Position(epoch=2, step=30)
    assert capsys.readouterr().err == "the checkpoint's position does not hold num_worse: it begins with 0\n"
