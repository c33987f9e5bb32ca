"""Saves by the clock, and a run that ends when its time is up."""

import itertools
import json

import pytest
from conftest import PROGRAMS, TINY, assert_same_run, lines_of, make_model, train
from forks import forked

from train_loop.checkpoint.durable import steps_in
from train_loop.main import main
from train_loop.process import Clock

NO_TIME = "--max_minutes=1e-6"  # is up before the first step


@pytest.fixture(scope="module")
def arguments(text_file):
    """4 steps with dropout; a line every third one, so that a save comes between two lines."""
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=4", "--eval_steps=3", "--logging_steps=3"]
    return [*arguments, "--checkpoints_total_limit=9"]


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert main([*arguments, f"--output_dir={folder}"]) == 0
    return folder


def ticking(**minutes):
    """A clock that is a minute later each time that it is read."""
    ticks = itertools.count(0, 60)
    return Clock(**minutes, now=lambda: next(ticks))


def test_a_checkpoint_is_saved_when_the_last_one_is_so_many_minutes_old(blocks, tmp_path):
    values = {"max_train_steps": 9, "checkpoints_total_limit": 9}
    train(make_model(), blocks, blocks[:4], tmp_path / "run", clock=ticking(save_minutes=4, began=0), **values)
    # minute 0 at the beginning, 4 at step 3, 5 when that is saved, 9 at step 7; the last one is saved anyway
    assert steps_in(tmp_path / "run" / "checkpoints") == [3, 7, 9]


def test_a_save_by_steps_puts_off_the_one_by_the_clock(blocks, tmp_path):
    values = {"max_train_steps": 8, "checkpointing_steps": "2", "checkpoints_total_limit": 9}
    train(make_model(), blocks, blocks[:4], tmp_path / "run", clock=ticking(save_minutes=4, began=0), **values)
    assert steps_in(tmp_path / "run" / "checkpoints") == [2, 4, 6, 8]


def test_with_checkpointing_steps_none_the_clock_alone_saves_and_the_end_does(arguments, reference, tmp_path):
    common = [*arguments, "--checkpointing_steps=none"]
    assert main([*common, f"--output_dir={tmp_path}/often", "--save_minutes=1e-6"]) == 0
    assert steps_in(tmp_path / "often" / "checkpoints") == [1, 2, 3, 4]
    assert main([*common, f"--output_dir={tmp_path}/never", "--save_minutes=1000"]) == 0
    assert steps_in(tmp_path / "never" / "checkpoints") == [4]
    assert_same_run(tmp_path / "often", reference)


def test_a_run_whose_time_is_up_exports_and_says_how_far_it_came(arguments, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*arguments, f"--output_dir={folder}", "--checkpointing_steps=none", NO_TIME]) == 0
    said = capsys.readouterr().out
    assert "stopped after 1e-06 minutes (max_minutes) at step 1 of 4" in said
    assert "--resume_from_checkpoint auto" in said
    results = json.loads((folder / "all_results.json").read_text())
    evaluated = [line["eval_loss"] for line in lines_of(folder) if line["step"] == 1 and "eval_loss" in line]
    assert results["step"] == 1 and [results["eval_loss"]] == evaluated
    assert set(results["exported"]) > {"model.safetensors", "config.json", "tokenizer.json"}


def test_a_run_that_ended_at_its_time_again_and_again_is_the_one_that_never_did(arguments, reference, tmp_path, capsys):
    """The evaluation at the end of each part leaves no trace in the next."""
    folder = tmp_path / "run"
    command = [*arguments, f"--output_dir={folder}", "--resume_from_checkpoint=auto", NO_TIME]
    for step in range(1, 4):
        assert main(command) == 0
        assert json.loads((folder / "all_results.json").read_text())["step"] == step
    assert main(command) == 0
    told = capsys.readouterr()
    assert told.out.count("stopped after") == 3 and "damaged" not in told.err
    assert_same_run(folder, reference)
    assert main(command) == 0 and "is finished: 4 steps" in capsys.readouterr().out


def test_the_evaluation_at_the_end_of_the_time_does_not_use_up_patience(arguments, tmp_path):
    """It cannot be the best either: a run with more time would not have made it."""
    more = ["--early_stopping_patience=1", "--early_stopping_threshold=9", "--load_best_model_at_end", "--eval_steps=4"]
    command = [*arguments, *more, f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=auto"]
    assert main([*command, NO_TIME]) == 0 and main([*command, NO_TIME]) == 0
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["position"]["num_worse"] == 0 and state["position"]["best"] is None
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["step"] == 4


def test_the_main_processs_clock_decides_for_all(arguments, tmp_path):
    more = [f"--output_dir={tmp_path}/run", "--max_minutes=50"]
    done = forked(PROGRAMS / "main_clock_ahead.py", *arguments, *more, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("stopped after 50 minutes (max_minutes) at step 1 of 4") == 1
    assert steps_in(tmp_path / "run" / "checkpoints") == [1]


@pytest.mark.parametrize("word", ["--save_minutes=0", "--max_minutes=-1"])
def test_minutes_are_above_zero(word, arguments, tmp_path, capsys):
    assert main([*arguments, f"--output_dir={tmp_path}/run", word]) == 1
    assert "above 0" in capsys.readouterr().err
