"""A run that cannot be lost: killed, stopped, damaged and resumed, it ends as if nothing had been."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    LAUNCH,
    NO_DROPOUT,
    PROGRAMS,
    ROOT,
    TINY,
    TWO,
    assert_lines_agree,
    assert_same_run,
    copy_until,
    largest_file,
    lines_of,
    run_program,
    without_timings,
)
from forks import forked

from train_loop import loop
from train_loop.checkpoint.durable import damage, name_of, steps_in
from train_loop.checkpoint.random_state import rng_state, set_rng_state
from train_loop.main import main


@pytest.fixture(scope="module")
def arguments(text_file):
    """26 steps in two epochs, with dropout; checkpoints at 5, 10, 15, 20, 25 and 26, an evaluation every 7 steps."""
    return [*TINY, f"--train_file={text_file}", "--num_train_epochs=2", "--checkpointing_steps=5", "--eval_steps=7"]


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
    """The run that was left alone."""
    output_dir = tmp_path_factory.mktemp("reference") / "run"
    assert main([*arguments, f"--output_dir={output_dir}", "--checkpoints_total_limit=9"]) == 0
    return output_dir


@pytest.fixture
def interrupted(reference, tmp_path):
    """The same folder as a kill after step 15 would have left it."""
    output_dir = tmp_path / "run"
    copy_until(15, reference, output_dir)
    return output_dir


@pytest.mark.parametrize(
    "processes, number, kills",
    [(1, "KILL", 6), (2, "KILL", 3), (1, "TERM", 2), pytest.param(2, "USR1", 2, marks=pytest.mark.slow)],
)
def test_a_run_killed_at_random_instants_ends_as_if_left_alone(processes, number, kills):
    """The short form of tests/benchmarks/kills.py, which compares weights and metrics bit for bit."""
    harness = "tests/benchmarks/kills.py"
    done = forked(harness, f"--kills={kills}", f"--processes={processes}", f"--signal={number}", timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == kills and counts["equal"] == counts["runs"] > 0


@pytest.mark.quick
def test_the_checkpoint_of_every_step_leads_to_the_same_end(interrupted, arguments, reference):
    """Mid-epoch, at its boundary after 13 steps, in the second epoch; metrics.jsonl is cut back to each."""
    for step in (15, 10, 5):
        resume = f"--resume_from_checkpoint={reference}/checkpoints/{name_of(step)}"
        assert main([*arguments, f"--output_dir={interrupted}", resume]) == 0
        assert_same_run(interrupted, reference)
        (interrupted / "all_results.json").unlink()


@pytest.mark.parametrize("other", [torch.optim.Adafactor, torch.optim.NAdam])
def test_a_run_with_a_different_optimizer_resumes_bit_for_bit(other, arguments, tmp_path, monkeypatch):
    """As after a change of one line in optim.py: an optimizer whose states have other shapes than the weights, and one
    that keeps its numbers as tensors."""
    monkeypatch.setattr("train_loop.run.build_optimizer", lambda model, settings: other(model.parameters(), lr=0.01))
    arguments = [*arguments, "--max_train_steps=10"]
    assert main([*arguments, f"--output_dir={tmp_path}/alone"]) == 0
    assert f"- optimizer: {other.__name__}, " in (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")
    copy_until(5, tmp_path / "alone", tmp_path / "resumed")
    assert main([*arguments, f"--output_dir={tmp_path}/resumed", "--resume_from_checkpoint=auto"]) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "alone")


@pytest.mark.quick
@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped", "removed"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_file_is_noticed(name, how, interrupted):
    path = interrupted / "checkpoints" / "step-000015"
    assert damage(path) is None
    file, size = path / name, (path / name).stat().st_size
    if how == "removed":
        file.unlink()
    elif how == "flipped":
        content = bytearray(file.read_bytes())
        for position in np.random.default_rng(0).integers(size, size=20):
            content[position] ^= 1 << int(position % 8)
            file.write_bytes(content)
            assert damage(path) is not None, f"bit {position % 8} of byte {position}"
            content[position] ^= 1 << int(position % 8)
        content[size // 2] ^= 1
        file.write_bytes(content)
    else:
        os.truncate(file, size - 1 if how == "truncated" else 0)
    assert damage(path) is not None


@pytest.mark.quick
@pytest.mark.parametrize("name, how", [("model.safetensors", "flipped"), ("manifest.json", "removed")])
def test_the_one_before_a_damaged_checkpoint_is_used(name, how, interrupted, arguments, reference, capsys):
    path = interrupted / "checkpoints" / "step-000015" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?") if how == "flipped" else path.unlink()
    assert main([*arguments, f"--output_dir={interrupted}", f"--resume_from_checkpoint={path.parent}"]) == 1
    assert "step-000015 is not a complete checkpoint: " + name in capsys.readouterr().err
    assert main([*arguments, f"--output_dir={interrupted}", "--resume_from_checkpoint=auto"]) == 0
    done = capsys.readouterr()
    assert re.search(r"step-000015 is damaged \(" + name, done.err) and "checkpoints/step-000010\n" in done.out
    assert_same_run(interrupted, reference)
    assert damage(interrupted / "checkpoints" / "step-000025") is None


def test_only_damaged_checkpoints_are_an_error_and_stay(interrupted, arguments, capsys):
    for path in interrupted.glob("checkpoints/*/state.json"):
        path.write_text("{}")
    assert main([*arguments, f"--output_dir={interrupted}", "--resume_from_checkpoint=auto"]) == 1
    assert "is complete. To start again: --overwrite_output_dir" in capsys.readouterr().err
    assert len(steps_in(interrupted / "checkpoints")) == 3


@pytest.mark.quick
def test_the_newest_and_the_best_are_kept(arguments, tmp_path, reference):
    assert steps_in(reference / "checkpoints") == [5, 10, 15, 20, 25, 26]
    # eight blocks are memorised: the validation loss rises again
    run_dir = tmp_path / "run"
    more = ["--max_train_samples=8", "--num_train_epochs=60", "--learning_rate=3e-2", "--eval_steps=1"]
    more += ["--checkpointing_steps=1", "--checkpoints_total_limit=3"]
    assert main([*arguments, *more, f"--output_dir={run_dir}"]) == 0
    losses = {line["step"]: line["eval_loss"] for line in lines_of(run_dir) if line.get("eval_loss") and line["step"]}
    best = min(losses, key=losses.get)
    assert best < 50, "the model did not memorise them"
    assert steps_in(run_dir / "checkpoints") == [best, 58, 59, 60]


def test_a_finished_run_says_so_and_is_extended_only_on_request(interrupted, arguments, reference, capsys):
    resume = [*arguments, f"--output_dir={interrupted}", "--resume_from_checkpoint=auto"]
    assert main(resume) == 0
    before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")}
    capsys.readouterr()
    assert main(resume) == 0
    assert f"the run in {interrupted} is finished: 26 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")} == before

    assert main([*resume, "--num_train_epochs=3"]) == 1
    assert "num_steps: 26 -> 39. To resume with the new ones, give --resume_with_changes" in capsys.readouterr().err
    assert main([*resume, "--num_train_epochs=3", "--resume_with_changes"]) == 0
    lines = [line for line in lines_of(interrupted) if "loss" in line]
    assert lines[-1]["step"] == 39 and len({line["step"] for line in lines}) == len(lines)
    # the schedule is that of a run of 39 steps from now on
    assert lines[-1]["learning_rate"] == pytest.approx(1e-2 / 39)
    assert json.loads((interrupted / "all_results.json").read_text())["step"] == 39


def test_a_finished_run_whose_checkpoints_are_gone_is_left_as_it_was(arguments, reference, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir, ignore=shutil.ignore_patterns("checkpoints"))
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert main([*arguments, f"--output_dir={run_dir}", "--resume_from_checkpoint=auto"]) == 1
    assert "a finished run without checkpoints: there is nothing to resume" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_run_stopped_in_its_last_evaluation_keeps_that_line_however_often_it_is_resumed(
    arguments, reference, tmp_path, monkeypatch
):
    evaluate, num_evaluations = loop.evaluate_splits, sum("eval_loss" in line for line in lines_of(reference))

    def with_a_signal_in_the_last(*values):
        nonlocal num_evaluations
        num_evaluations -= 1
        if num_evaluations == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*values)

    monkeypatch.setattr(loop, "evaluate_splits", with_a_signal_in_the_last)
    run_dir = tmp_path / "run"
    assert main([*arguments, f"--output_dir={run_dir}"]) == 75
    for _ in range(2):
        assert main([*arguments, f"--output_dir={run_dir}", "--resume_from_checkpoint=auto"]) == 0
        assert_same_run(run_dir, reference)


@pytest.mark.parametrize(
    "change, message",
    [
        ("--learning_rate=1e-3", "learning_rate: 0.01 -> 0.001. To resume with the new ones, give"),
        ("--seed=1", "belongs to a different run (checkpoint -> now): seed: 42 -> 1"),
        ("--per_device_train_batch_size=4", "blocks in an optimizer step: 8 -> 4"),
        ("--max_train_samples=90", "belongs to a different run (checkpoint -> now): training blocks"),
        (
            "--config_overrides=n_layer=1,n_head=1,n_embd=32",
            "belongs to a different run (checkpoint -> now): model config",
        ),
    ],
)
def test_settings_that_change_the_result_are_refused(change, message, interrupted, arguments, capsys):
    before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")}
    assert main([*arguments, f"--output_dir={interrupted}", "--resume_from_checkpoint=auto", change]) == 1
    assert message in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")} == before


def test_other_settings_that_differ_are_listed(interrupted, arguments, reference, capsys):
    resume = [*arguments, f"--output_dir={interrupted}", "--resume_from_checkpoint=auto"]
    assert main([*resume, "--per_device_eval_batch_size=30", "--learning_rate=1e-2"]) == 0
    listed = capsys.readouterr().err
    assert "per_device_eval_batch_size: 8 -> 30" in listed and "learning_rate" not in listed


def test_a_random_state_that_cannot_be_restored_is_an_error(interrupted, arguments):
    state = rng_state()
    torch.rand(3), np.random.rand(3)
    set_rng_state(json.loads(json.dumps(state)))
    assert json.dumps(rng_state()) == json.dumps(state)
    with pytest.raises(ValueError, match="random state cannot be restored"):
        set_rng_state(state | {"torch": state["torch"][:-1]})
    with pytest.raises(ValueError, match="another kind of device"):
        set_rng_state(state | {"device": [0] * 16})
    set_rng_state(state)


def test_auto_starts_where_there_is_nothing_and_leaves_foreign_folders_alone(arguments, tmp_path, capsys):
    resume = [*arguments, "--max_train_steps=2", "--resume_from_checkpoint=auto"]
    assert main([*resume, f"--output_dir={tmp_path}/new"]) == 0
    assert "nothing yet: from the beginning" in capsys.readouterr().out
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years")
    assert main([*resume, f"--output_dir={tmp_path}/foreign"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]
    assert main([*arguments, f"--output_dir={tmp_path}/new"]) == 1
    assert "or resume the run in it with --resume_from_checkpoint auto" in capsys.readouterr().err


def test_a_different_number_of_processes_resumes_with_the_same_batches(text_file, tmp_path, capsys):
    """Two processes begin, one resumes with two micro-batches in a step. Without dropout the losses agree up to
    rounding."""
    arguments = [*TINY, NO_DROPOUT, f"--train_file={text_file}", "--num_train_epochs=2", "--logging_steps=1"]
    arguments += ["--checkpointing_steps=9", "--learning_rate=1e-3"]
    arguments += ["--per_device_train_batch_size=4"]
    done = forked("train_loop/main.py", *arguments, f"--output_dir={tmp_path}/two", processes=2)
    assert done.returncode == 0, done.stderr
    copy_until(18, tmp_path / "two", tmp_path / "one")
    more = ["--gradient_accumulation_steps=2", "--resume_from_checkpoint=auto"]
    assert main([*arguments, *more, f"--output_dir={tmp_path}/one"]) == 0
    said = capsys.readouterr().err
    assert "the checkpoint is of 2 processes, this run has 1" in said and "gradient_accumulation_steps: 1 -> 2" in said
    assert_lines_agree(without_timings(tmp_path / "one"), without_timings(tmp_path / "two"))


@pytest.mark.parametrize(
    "step, message",
    [
        (15, "error: the checkpoint of step 20 cannot be written"),
        (26, "error: the model cannot be exported"),
    ],
)
def test_a_full_disk_ends_with_a_sentence_and_loses_nothing(step, message, arguments, reference, tmp_path, capsys):
    copy_until(step, reference, tmp_path / "run")
    resume = [*arguments, f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=auto"]
    with largest_file(20_000):
        assert main(resume) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(message), line
    checkpoints = tmp_path / "run" / "checkpoints"
    assert step in steps_in(checkpoints) and all(
        damage(checkpoints / name_of(s)) is None for s in steps_in(checkpoints)
    )
    assert not list((tmp_path / "run").rglob("*.partial")) and not (tmp_path / "run" / "model.safetensors").exists()
    assert main(resume) == 0
    assert_same_run(tmp_path / "run", reference)


def test_a_nan_on_one_process_stops_all_and_names_the_last_checkpoint(arguments, tmp_path):
    output_dir = tmp_path / "run"
    batch = ["--per_device_train_batch_size=4", "--logging_steps=1"]
    done = forked(PROGRAMS / "nan_on_rank_1.py", *arguments, *batch, f"--output_dir={output_dir}", processes=2)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (
        "step 7: the loss (nan nats)" in error and f"last checkpoint is {output_dir}/checkpoints/step-000005" in error
    )
    assert steps_in(output_dir / "checkpoints") == [5]
    assert [line["step"] for line in lines_of(output_dir) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_killed_worker_is_restarted_and_the_run_resumes_without_a_flag(arguments, tmp_path):
    arguments = [*arguments, "--per_device_train_batch_size=4"]
    launcher = (*TWO, "--max_restarts=2")
    environment = {"SIGNAL": "SIGKILL", "PID_FILE": f"{tmp_path}/pid"}
    arguments_of_run = [*arguments, f"--output_dir={tmp_path}/run"]
    done = run_program("rank_1_dies_once.py", *arguments_of_run, launcher=launcher, **environment)
    assert done.returncode == 0, done.stderr
    assert "checkpoints/step-000005" in done.stdout
    done = forked("train_loop/main.py", *arguments, f"--output_dir={tmp_path}/reference", processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", tmp_path / "reference")


def test_a_peer_that_hangs_becomes_an_error_in_the_time_that_was_set(arguments, tmp_path):
    arguments = [*arguments, "--per_device_train_batch_size=4", "--ddp_timeout=5", f"--output_dir={tmp_path}/run"]
    launched = subprocess.Popen(
        [*TWO, PROGRAMS / "rank_1_dies_once.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SIGNAL": "SIGSTOP", "PID_FILE": f"{tmp_path}/pid"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in launched.stderr:
        lines.append(line)
        if line.startswith("error: process 0 lost its peers"):
            break
    waited = time.time() - (tmp_path / "pid").stat().st_mtime  # since just before the other one stopped
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # the launcher would after a grace of half a minute
    assert lines[-1].startswith("error: process 0 lost its peers"), "".join(lines)
    assert 5 <= waited < 600, "seconds; half an hour is torch's own"
    assert launched.wait(300) != 0
    assert damage(tmp_path / "run" / "checkpoints" / "step-000005") is None


def wait_for(path, seconds=300):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


def test_a_sigterm_to_the_launcher_reaches_the_run(arguments, tmp_path, reference):
    """With one process, `accelerate launch` does not pass the signal on: it dies, and the run must notice that."""
    arguments = [*arguments, f"--output_dir={tmp_path}/run", "--max_train_samples=100"]
    launched = subprocess.Popen(
        [*LAUNCH, "train_loop/main.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "run" / "checkpoints" / "step-000005")
    launched.send_signal(signal.SIGTERM)
    error = launched.stderr.read()  # until the run itself has closed it
    assert "stopped by SIGTERM after step" in error and "--resume_from_checkpoint auto" in error
    assert main([*arguments, "--resume_from_checkpoint=auto"]) == 0
    assert_same_run(tmp_path / "run", reference)


def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_is_complete(arguments, tmp_path):
    """The first Ctrl-C comes in a step that does not end."""
    output_dir = tmp_path / "run"
    running = subprocess.Popen(
        [sys.executable, PROGRAMS / "hangs_after_step_5.py", output_dir, *arguments, f"--output_dir={output_dir}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert any(line == "slow\n" for line in running.stdout)
        running.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1.5)
        for _ in range(10):  # at once: but where the first came late, the second counts as the same
            running.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(20)
                break
    finally:
        running.kill()
    # on a busy machine one more may reach the interpreter while it ends; a shell says 130 of both
    assert running.wait() in (130, -signal.SIGINT)
    assert "stopped by SIGINT" in running.stderr.read()
    assert damage(output_dir / "checkpoints" / "step-000005") is None
