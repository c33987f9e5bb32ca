"""Trackers: what TensorBoard and MLflow were given, read back with their own readers, beside metrics.jsonl."""

import logging
import math

import numpy as np
import pytest
from conftest import TINY, lines_of

from train_loop.main import main
from train_loop.report.trackers import wanted_trackers
from train_loop.settings.settings import TRACKERS


def expected(output_dir):
    """{tracker's name of a metric: [(step, value)]}, from metrics.jsonl."""
    points = {}
    for line in lines_of(output_dir):
        group = "eval" if "eval_loss" in line else "train"
        for name, value in line.items():
            if name not in ("step", "samples"):
                points.setdefault(f"{group}/{name.removeprefix('eval_')}", []).append((line["step"], value))
    return points


@pytest.mark.parametrize("name", ["alone", "killed"])
def test_tensorboard_has_each_line_of_metrics_once_also_after_kills(watched, name):
    """As TensorBoard itself reads its files, and drops what a later one takes back. Values are float32 there."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    folder = watched["folder"] / name
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    logging.disable(logging.WARNING)  # it says what it drops
    events.Reload()
    logging.disable(logging.NOTSET)
    points = {
        tag: [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    assert "learning_rate: 0.01" in points.pop("settings/text_summary")[0][1].item().decode()
    samples = points.pop("eval/samples/text_summary")
    assert points.keys() == expected(folder).keys()
    for tag, values in expected(folder).items():
        assert points[tag] == [(step, np.float32(value)) for step, value in values], tag
    lines = [line for line in lines_of(folder) if "samples" in line]
    assert [step for step, _ in samples] == [line["step"] for line in lines]
    for (_, text), line in zip(samples, lines, strict=True):
        assert "The value" + line["samples"]["The value"] in text.item().decode()


@pytest.mark.parametrize("name", ["alone", "killed"])
def test_mlflow_has_one_run_with_each_line_of_metrics_once_also_after_kills(watched, name, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(f"file:{watched['folder']}/{name}.mlflow")
    (experiment,) = (e for e in client.search_experiments() if e.name == "train_loop")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["learning_rate"] == "0.01" and run.info.run_name == name
    points = expected(watched["folder"] / name)
    timings = points.pop("train/tokens_per_second")  # of the steps that ran twice: those of the first time
    assert run.data.metrics.keys() == {*points, "train/tokens_per_second"}
    for metric, values in points.items():
        assert [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, metric)] == values, metric
    history = client.get_metric_history(run.info.run_id, "train/tokens_per_second")
    assert [p.step for p in history] == [step for step, _ in timings]


def test_a_tracker_that_fails_costs_one_warning_and_nothing_else(watched):
    warnings = [line for line in watched["errors"].splitlines() if "gets no more lines" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: mlflow failed and gets no more lines (")
    losses = [line["loss"] for line in lines_of(watched["folder"] / "plain") if "loss" in line]
    assert len(losses) == 40 and all(map(math.isfinite, losses))


def test_a_tracker_that_does_not_start_costs_one_warning_and_nothing_else(text_file, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/file/store")  # in no folder
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=2", f"--output_dir={tmp_path}/run"]
    assert main([*arguments, "--report_to=mlflow"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: mlflow")]
    assert len(warnings) == 1 and "failed and gets no more lines (" in warnings[0]


def test_a_library_that_is_missing_is_one_sentence_before_anything_is_asked_for(capsys, tmp_path, monkeypatch):
    """A folder of the library's name, such as Weights & Biases leaves, does not stand for it."""
    from importlib.util import find_spec

    name = next(name for name in TRACKERS if find_spec(name) is None)
    (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--model_name_or_path=no/such-model", "--dataset_name=no/such-data", f"--output_dir={tmp_path}/run"]
    assert main([*arguments, "--report_to", "tensorboard", name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: report_to: {name} is not installed") and "no/such" not in line
    assert not (tmp_path / "run").exists()


def test_trackers_are_off_unless_asked_for_and_all_means_those_installed():
    from train_loop.settings.command_line import read_settings

    data = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o"]
    assert wanted_trackers(read_settings(data)) == wanted_trackers(read_settings([*data, "--report_to=none"])) == []
    assert {"tensorboard", "mlflow"} <= set(wanted_trackers(read_settings([*data, "--report_to=all"])))
    with pytest.raises(ValueError, match="must be text, all, none"):
        read_settings([*data, "--report_to", "tensorboard", "abacus"])


def test_a_tracker_is_given_nothing_that_it_cannot_keep(watched):
    """Samples are text, which MLflow has no place for among its metrics: Accelerate warns of what it leaves out."""
    assert "MLflowTracker is attempting to log" not in watched["errors"]
