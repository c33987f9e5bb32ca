"""The best model and early stopping: which weights are exported, and when a run ends."""

import json
import re
import shutil

import pytest
import torch
from conftest import assert_same_run, lines_of, weights_of, without_timings
from forks import forked
from safetensors.torch import load_file

from train_loop import best
from train_loop.checkpoint.durable import name_of, steps_in
from train_loop.main import main
from train_loop.position import Position
from train_loop.report.metrics import Metrics
from train_loop.settings.settings import Settings


def losses_of(output_dir):
    """{step: validation loss}, without the untrained model's."""
    return {line["step"]: line["eval_loss"] for line in lines_of(output_dir) if "eval_loss" in line and line["step"]}


def assert_exports_its_best(output_dir):
    losses = losses_of(output_dir)
    step = min(losses, key=losses.get)
    assert step < max(losses), "the last was the best: nothing is shown"
    results = json.loads((output_dir / "all_results.json").read_text())
    assert (results["exported_step"], results["step"]) == (step, max(losses))
    assert (results["eval_loss"], results["last_eval_loss"]) == (losses[step], losses[max(losses)])
    exported = weights_of(output_dir)
    kept = load_file(output_dir / "checkpoints" / name_of(step) / "model.safetensors")
    assert all(torch.equal(exported[name], kept[name]) for name in exported)
    return step


def test_the_best_model_is_exported_and_card_and_results_say_so(watched, capsys):
    folder = watched["folder"] / "alone"
    step, losses = assert_exports_its_best(folder), losses_of(folder)
    card = (folder / "README.md").read_text()
    assert f"after {step} optimizer steps: loss {losses[step]:.4f}" in card
    assert f"after the last step, {max(losses)}, it was {losses[max(losses)]:.4f}" in card
    # the weights in the folder have that loss: evaluated again on the same rows
    arguments = [a for a in watched["arguments"] if a.split("=")[0] in ("--block_size", "--max_eval_samples")]
    arguments += [a for a in watched["arguments"] if a.startswith("--train_file")]
    assert main([f"--model_name_or_path={folder}", *arguments, "--eval_only"]) == 0
    assert capsys.readouterr().out.split("eval_loss")[1].split()[0] == f"{losses[step]:.4f}"


def test_a_run_stops_when_patience_has_run_out_and_says_why(watched):
    folder, output = watched["folder"] / "alone", watched["outputs"][0]
    losses = losses_of(folder)
    step = min(losses, key=losses.get)
    assert max(losses) == step + 2 * 6 < 40  # an evaluation every second step, six of patience
    why = f"stopped early after step {step + 12} of 40: the last 6 evaluations did not lower the validation loss"
    assert f"{why} (best: {losses[step]:.4f} at step {step})" in output
    assert steps_in(folder / "checkpoints") == [step, step + 12]  # one newest, and the best


def test_best_model_and_patience_survive_a_kill(watched):
    folder = watched["folder"]
    assert_same_run(folder / "killed", folder / "alone")
    assert_exports_its_best(folder / "killed")
    positions = [
        json.loads((folder / name / "checkpoints" / "step-000024" / "state.json").read_text())["position"]
        for name in ("alone", "killed")
    ]
    assert positions[0] == positions[1] and positions[0]["num_worse"] == 6


def test_samples_trackers_and_saves_of_best_models_do_not_change_a_run(watched):
    """Samples, trackers, saves of best models: up to the early end, the lines of a run without, bit for bit."""
    alone, plain = watched["folder"] / "alone", watched["folder"] / "plain"
    lines, without = without_timings(alone), without_timings(plain)
    assert any([line.pop("samples", None) for line in lines])
    assert len(lines) > 20 and lines == without[: len(lines)]
    assert lines_of(plain)[-1]["step"] == 40 and "exported_step" not in (plain / "all_results.json").read_text()


def test_a_run_that_stopped_early_says_so_and_continues_with_more_patience(watched, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(watched["folder"] / "alone", folder)
    arguments = [a for a in watched["arguments"] if a not in ("--report_to", "tensorboard", "mlflow")]
    resume = [*arguments, f"--output_dir={folder}", "--resume_from_checkpoint=auto"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(resume) == 0
    output = capsys.readouterr().out
    assert f"the run in {folder} is finished: 24 steps" in output and "stopped early after step 24 of 40" in output
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    assert main([*resume, "--early_stopping_patience=7"]) == 1
    assert (
        "early_stopping_patience: 6 -> 7. To resume with the new ones, give --resume_with_changes"
        in capsys.readouterr().err
    )
    # a best model that is gone is said to be, and not made up
    (folder / "checkpoints" / "step-000012" / "model.safetensors").write_bytes(b"")
    assert main([*resume, "--early_stopping_patience=7", "--resume_with_changes"]) == 0
    assert "step-000012, is lost (model.safetensors has 0 bytes" in capsys.readouterr().err
    assert json.loads((folder / "all_results.json").read_text())["exported_step"] == 26


def test_a_run_that_stopped_early_and_was_killed_before_its_export_is_exported_and_takes_no_further_step(
    watched, tmp_path
):
    shutil.copytree(watched["folder"] / "alone", tmp_path / "run")
    for name in ("all_results.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    arguments = [a for a in watched["arguments"] if a not in ("--report_to", "tensorboard", "mlflow")]
    assert main([*arguments, f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=auto"]) == 0
    assert lines_of(tmp_path / "run") == lines_of(watched["folder"] / "alone")
    assert_exports_its_best(tmp_path / "run")


def test_a_damaged_best_model_is_reported_and_the_last_one_exported(watched, tmp_path, capsys, monkeypatch):
    """The disk fails in the last step, some steps after the best evaluation."""
    shutil.copytree(watched["folder"] / "alone", tmp_path / "run")
    damaged, count_step = tmp_path / "run" / "checkpoints" / "step-000012", Metrics.count_step

    def count_step_and_damage(self, step, *arguments):
        if step == 26:
            (damaged / "model.safetensors").write_bytes(b"")
        count_step(self, step, *arguments)

    monkeypatch.setattr(Metrics, "count_step", count_step_and_damage)
    resume = [a for a in watched["arguments"] if a not in ("--report_to", "tensorboard", "mlflow")]
    resume += [f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=auto"]
    assert main([*resume, "--early_stopping_patience=7", "--resume_with_changes"]) == 0
    assert f"the best checkpoint, {damaged}, is damaged (model.safetensors has 0 bytes" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["exported_step"] == 26


def test_two_processes_decide_alike_and_write_one_sample_each_time(watched, tmp_path):
    arguments = [a for a in watched["arguments"] if a not in ("--report_to", "tensorboard", "mlflow")]
    arguments += ["--per_device_train_batch_size=4", "--early_stopping_patience=3"]
    done = forked("train_loop/main.py", *arguments, f"--output_dir={tmp_path}/run", processes=2)
    assert done.returncode == 0, done.stderr
    assert "world size 2" in done.stdout and done.stdout.count("stopped early after step") == 1
    step = assert_exports_its_best(tmp_path / "run")
    assert max(losses_of(tmp_path / "run")) == step + 6
    num_evaluations = len(losses_of(tmp_path / "run")) + 1
    assert len(re.findall(r'^ +"The value" ', done.stdout, re.M)) == num_evaluations


def position_after(losses, **settings):
    """The position after evaluations with these losses, at steps 0, 1, 2, ..., and the step at which the run ends."""
    position, end = Position(), None
    for position.step, loss in enumerate(losses):
        best.take_evaluation(position, {"eval_loss": loss}, Settings(**settings))
        end = best.last_step(position, 100, Settings(**settings))
    return position, end


def test_the_untrained_model_is_never_the_best_and_the_first_of_equals_is():
    position, _ = position_after([1.0, 3.0, 2.0, 2.0])
    assert (position.best_step, position.num_worse) == (2, 1)


@pytest.mark.parametrize("threshold, end", [(0.0, 100), (0.5, 3)])
def test_small_gains_count_only_above_the_threshold(threshold, end):
    """As in transformers, the threshold is for patience alone: the best model is the one with the lowest loss."""
    settings = {"early_stopping_patience": 2, "early_stopping_threshold": threshold}
    position, found = position_after([9.0, 5.0, 4.9, 4.8], **settings)
    assert (found, position.best_step) == (end, 3)
