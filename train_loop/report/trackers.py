"""Trackers: TensorBoard, MLflow, Weights & Biases and others get the lines of metrics.jsonl too, through Accelerate's
classes for them. metrics.jsonl stays the record: a tracker that fails is left out with a warning, and training
continues.

After a resume the same run continues, with no step twice and none lost, as far as the tracker can do that:
    tensorboard   drops what came after the checkpoint: a new events file says so at its beginning
    mlflow        cannot take lines back: steps that it has already are not sent again
    wandb         leaves out the steps that it has already; in offline mode each start has a folder of its own
    others        begin a new run, and a line says so
"""

import dataclasses
import importlib.util
import os
from typing import Any

from train_loop.errors import UserError, one_line, warn
from train_loop.report.curve import Line
from train_loop.settings import TRACKERS, Settings

PROJECT = "train_loop"  # where trackers collect several runs


def wanted_trackers(settings: Settings) -> list[str]:
    """The names of the trackers that `report_to` asks for. Raises UserError if one's library is not installed."""
    names = settings.report_to or ["none"]
    if names == ["all"]:
        return [name for name in TRACKERS if _is_installed(name)]
    names = [name for name in TRACKERS if name in names]
    if missing := [name for name in names if not _is_installed(name)]:
        them = " ".join(missing).replace("_", "-")
        raise UserError(f"report_to: {', '.join(missing)} is not installed; python -m pip install {them}")
    return names


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder ./wandb that a run left is not a library


class Trackers:
    """The trackers of one run. Only the main process starts them; on the other processes the methods do nothing."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.running: list[Any] = []  # Accelerate's trackers
        self.ids: dict[
            str, dict[str, Any]
        ] = {}  # of the runs, by tracker, as its class takes them; kept in checkpoints
        self.sent: set[tuple[str, int]] = set()  # (metric, step) that MLflow had before this start

    def start(self, lines: list[Line], step: int | None) -> None:
        """Starts them for a run that resumes at `step`, or a new one (None). `lines`: of metrics.jsonl so far."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # a server that does not answer must not keep the run waiting for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        output_dir = self.settings.folder
        run_name = self.settings.run_name or output_dir.resolve().name
        projects = {"tensorboard": "tensorboard", "wandb": os.environ.get("WANDB_PROJECT", PROJECT)}
        new: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": step or 0},
            "mlflow": {"run_name": run_name},
            "wandb": {"name": run_name},
        }
        for name in wanted_trackers(self.settings):
            kind: Any = LOGGER_TYPE_TO_CLASS[name]  # Accelerate says type
            goes_on = name in self.ids
            folder = [output_dir] if kind.requires_logging_directory else []
            tracker = kind(projects.get(name, PROJECT), *folder, **self.ids.get(name, new.get(name, {})))
            self.running.append(tracker)
            if not self._attempt(tracker, "start"):
                continue
            if name == "mlflow":
                self.ids[name] = {"run_id": tracker.tracker.info.run_id}
            elif name == "wandb":
                self.ids[name] = {"id": tracker.tracker.id, "resume": "allow"}
            elif name != "tensorboard" and step is not None:
                warn(f"{name} begins a new run: train_loop cannot continue the old one there")
            if goes_on and name == "mlflow":
                self._ask_mlflow(tracker)
            elif not goes_on and not (name == "tensorboard" and step is not None):
                self._send_settings(tracker)
        for line in lines:
            if line["step"] == step:  # TensorBoard drops it too: the step's evaluation may be still to come
                self.log(line)

    def _send_settings(self, tracker: Any) -> None:
        values = {n: str(v) if isinstance(v, (list, dict)) else v for n, v in dataclasses.asdict(self.settings).items()}
        if tracker.name == "tensorboard":  # its table of settings would be a second run beside this one
            text = "\n".join(f"    {name}: {value}" for name, value in values.items())
            self._attempt(tracker, "log", {"settings": text}, 0)
        else:
            self._attempt(tracker, "store_init_configuration", values)

    def _ask_mlflow(self, tracker: Any) -> None:
        import mlflow

        try:
            for metric in ("train/loss", "eval/loss"):
                history = mlflow.MlflowClient().get_metric_history(tracker.tracker.info.run_id, metric)
                self.sent |= {(metric, point.step) for point in history}
        except Exception as error:
            self._drop(tracker, error)

    def log(self, line: Line) -> None:
        """Sends a line of metrics.jsonl: its `loss` as train/loss, its `eval_loss` as eval/loss, and so on."""
        group = "eval" if "eval_loss" in line else "train"
        values = {f"{group}/{name.removeprefix('eval_')}": value for name, value in line.items() if name != "step"}
        texts = values.pop("eval/samples", {})
        if texts:
            texts = {"eval/samples": "\n\n".join(prompt + text for prompt, text in texts.items())}
        for tracker in list(self.running):
            if tracker.name == "mlflow" and (f"{group}/loss", line["step"]) in self.sent:
                continue
            takes_text = tracker.name in ("tensorboard", "wandb")
            self._attempt(tracker, "log", values | texts if takes_text else values, line["step"])

    def finish(self) -> None:
        for tracker in list(self.running):
            self._attempt(tracker, "finish")
        self.running = []

    def _attempt(self, tracker: Any, method: str, *arguments: Any) -> bool:
        """Whether a method of a tracker succeeded. A tracker that fails is dropped."""
        try:
            getattr(tracker, method)(*arguments)
            return True
        except Exception as error:  # libraries raise anything
            self._drop(tracker, error)
            return False

    def _drop(self, tracker: Any, error: Exception) -> None:
        self.running.remove(tracker)
        warn(f"{tracker.name} failed and gets no more lines ({one_line(error)}); metrics.jsonl has everything")
