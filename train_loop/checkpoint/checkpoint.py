"""Checkpoints: save them, find them, restore a run from them. A checkpoint is either complete or absent.

    output_dir/checkpoints/step-000500/
        model.safetensors       every trained parameter and buffer by its name; a tied weight once
        optimizer.safetensors   the optimizer's tensors, as <parameter>.<name>
                                under FSDP: a file of each from each process, model-00001-of-00008.safetensors
        block_nats.safetensors  of the last and the best evaluation, as in output_dir/evaluations
        state.json              format, position, metrics, random states of every process, scaler, settings, versions
        manifest.json           size and digest of each file and of itself, written last

A checkpoint is written to a folder with a temporary name, flushed to the disk, and renamed. Only then are older ones
removed. So a kill at any instant leaves the previous one complete. The learning rate follows from the step.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from train_loop.checkpoint.durable import (
    checkpoints_in,
    damage,
    discard,
    flushed,
    name_of,
    put_in_place,
    steps_to_keep,
    write_manifest,
)
from train_loop.checkpoint.identity import FORMAT, refusal, remarks
from train_loop.checkpoint.mirror import Mirror
from train_loop.checkpoint.random_state import rng_state, set_rng_state
from train_loop.checkpoint.sharded import Tensors, is_sharded, load_optimizer, load_weights, saved_tensors, write_share
from train_loop.errors import UserError, num_of, one_line, tell, warn
from train_loop.position import Position
from train_loop.process import Clock, code_version
from train_loop.report import BLOCK_NATS, Metrics, block_nats_as_bytes, read_block_nats
from train_loop.settings import Settings
from train_loop.whole import remove


class Checkpoints:
    """The checkpoints of one run. Every process has this object and calls the same methods. The main process writes;
    under FSDP each process writes its shard of the tensors, to a disk that all processes must see."""

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        identity: dict[str, Any] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings, self.accelerator, self.identity = settings, accelerator, identity or {}
        self.clock = clock or Clock(settings.save_minutes, settings.max_minutes)
        self.folder = settings.folder / "checkpoints"
        self.mirror: Mirror | None = None
        if settings.mirror and accelerator.is_main_process:
            self.mirror = Mirror(settings.mirror, self.folder, lambda state: refusal(state, self.identity, settings))
        self.latest: Path | None = None  # the checkpoint that was saved last or resumed from
        self.resumed_step = math.inf  # the first save removes what is newer: those steps are run anew
        self.seconds = 0.0  # spent on saving

    def is_due(self, position: Position, last_step: int) -> bool:
        every, step = self.settings.checkpointing_steps, position.step
        if self.clock.save_is_due or self.clock.is_over:
            return True
        if every == "none":
            return step == last_step and self.clock.save_minutes is not None
        if step == last_step or (self.settings.load_best_model_at_end and step == position.best_step):
            return True
        return position.ends_epoch() if every == "epoch" else step % int(every) == 0

    def save(
        self, position: Position, model: torch.nn.Module, optimizer: torch.optim.Optimizer, metrics: Metrics
    ) -> Path:
        """Returns the checkpoint's folder. Raises UserError on every process if it cannot be written; earlier
        checkpoints stay."""
        began = time.perf_counter()
        tensors, optimizer_tensors, scalars = self._snapshot(model, optimizer)
        rng = gather_object([rng_state()])
        scaler = self.accelerator.scaler
        state = {
            "format": FORMAT,
            "train_loop": code_version(),
            "position": dataclasses.asdict(position),
            "metrics": metrics.state_dict(),
            "rng": rng,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "optimizer": scalars,
            "identity": self.identity,
            "settings": dataclasses.asdict(self.settings),
            "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        }
        records = {"state.json": json.dumps(state).encode(), BLOCK_NATS.name: block_nats_as_bytes(metrics.block_nats)}
        self._write(position, tensors, optimizer_tensors, records)
        self.latest = path = self.folder / name_of(position.step)
        self.clock.restart()
        if self.mirror:
            self.mirror.begin(path, self._kept())
        self.seconds += time.perf_counter() - began
        metrics.leave_out(time.perf_counter() - began)
        return path

    def _write(
        self, position: Position, tensors: Tensors, optimizer_tensors: Tensors, records: dict[str, bytes]
    ) -> None:
        is_main, sharded = self.accelerator.is_main_process, any(map(is_sharded, tensors.values()))
        step, partial = position.step, self.folder / f"{name_of(position.step)}.partial"
        try:
            self._together(step, is_main, lambda: self._begin(partial))
            write = lambda: self._write_tensors(partial, tensors, optimizer_tensors, sharded)  # noqa: E731
            written = self._together(step, is_main or sharded, write)
            self._together(step, is_main, lambda: self._finish(partial, position, records, written))
        finally:
            if is_main:
                with contextlib.suppress(OSError):
                    remove(partial)

    def _together(self, step: int, is_active: bool, action: Callable[[], Any]) -> list[Any]:
        """Runs `action` on the processes that are active. Returns the results of all of them. Raises UserError on all
        processes if `action` failed on one."""
        result = problem = None
        if is_active:
            try:
                result = action()
            except OSError as error:
                problem = f"the checkpoint of step {step} cannot be written ({error}); {self.say_latest()}"
        outcomes = gather_object([(result, problem)])
        if problem := next((problem for _, problem in outcomes if problem), None):
            raise UserError(problem)
        return [result for result, _ in outcomes if result is not None]

    def _snapshot(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """(tensors of the model, tensors of the optimizer, its other values), each by name. Nothing is copied."""
        model = self.accelerator.unwrap_model(model)
        tensors, names = saved_tensors(model), {id(p): name for name, p in model.named_parameters()}
        optimizer_tensors: Tensors = {}
        scalars: dict[str, Any] = {}
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                kept = optimizer_tensors if isinstance(value, torch.Tensor) else scalars
                kept[f"{names[id(parameter)]}.{key}"] = value
        return tensors, optimizer_tensors, scalars

    def _begin(self, partial: Path) -> None:
        self.folder.mkdir(exist_ok=True)
        for leftover in self.folder.glob("*.partial"):
            remove(leftover)
        partial.mkdir()

    def _write_tensors(
        self, partial: Path, tensors: Tensors, optimizer_tensors: Tensors, sharded: bool
    ) -> dict[str, Any]:
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        of = f"-{rank + 1:05}-of-{world_size:05}" if sharded else ""
        paths = partial / f"model{of}.safetensors", partial / f"optimizer{of}.safetensors"
        for path, content in zip(paths, (tensors, optimizer_tensors), strict=True):
            write_share(content, path, self.accelerator.is_main_process)
        return {path.name: flushed(path) for path in paths}

    def _finish(
        self, partial: Path, position: Position, records: dict[str, bytes], written: list[dict[str, Any]]
    ) -> None:
        files = {}
        for name, content in records.items():
            (partial / name).write_bytes(content)
            files[name] = flushed(partial / name)
        for entries in written:
            files |= entries
        evaluation = position.evaluation if position.evaluated_step == position.step else None
        eval_loss = evaluation["eval_loss"] if evaluation else None
        best_step = position.best_step if self.settings.load_best_model_at_end else None
        write_manifest(partial, {"step": position.step, "eval_loss": eval_loss, "best_step": best_step}, files)
        for step, path in checkpoints_in(self.folder):
            if step > self.resumed_step:
                discard(path)
        self.resumed_step = math.inf
        put_in_place(partial)
        self._rotate()

    def _kept(self) -> set[str]:
        return {name_of(step) for step in steps_to_keep(self.folder, self.settings.checkpoints_total_limit)}

    def _rotate(self) -> None:
        """Removes older checkpoints, except one that is being mirrored. Raises OSError."""
        kept = self._kept()
        for step, path in checkpoints_in(self.folder):
            if name_of(step) not in kept and not (self.mirror and self.mirror.is_reading(path)):
                discard(path)
        for path in self.folder.glob("*.discarded"):
            remove(path)

    def find(self) -> Path | None:
        """The checkpoint to resume from, or None for a new run; the same on every process. Prints which damaged ones
        were skipped. Raises UserError if there are only damaged ones, or if the one given by name is damaged."""
        found, problem = None, None
        if self.accelerator.is_main_process:
            try:
                found = self._find()
            except UserError as error:
                problem = str(error)
        found, problem = broadcast_object_list([found, problem])
        if problem:
            raise UserError(problem)
        self.latest = Path(found) if found else None
        return self.latest

    def _find(self) -> str | None:
        wanted = self.settings.resume_from_checkpoint
        if wanted is None:
            return None
        if wanted != "auto":
            if reason := damage(Path(wanted)):
                raise UserError(f"resume_from_checkpoint {wanted} is not a complete checkpoint: {reason}")
            return wanted
        found = checkpoints_in(self.folder)
        for _, path in reversed(found):
            reason = damage(path)
            if not reason:
                return str(path)
            tell(f"checkpoint {path} is damaged ({reason}): trying the one before it")
        if self.mirror and (fetched := self.mirror.fetch()):
            return str(fetched)
        if found:
            raise UserError(f"no checkpoint in {self.folder} is complete. To start again: --overwrite_output_dir")
        return None

    def position_of(self, path: Path) -> Position:
        """The `Position` of the checkpoint `path`. Raises UserError if this run would continue in a different way than
        the one that was interrupted."""
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if reason := refusal(state, self.identity, self.settings):
            raise UserError(f"{path} {reason}")
        if self.accelerator.is_main_process:
            for remark in remarks(state, self.identity, self.settings):
                tell(remark)
        return Position.from_dict(state["position"], self.accelerator.is_main_process)

    def restore(
        self, path: Path, position: Position, model: torch.nn.Module, optimizer: torch.optim.Optimizer, metrics: Metrics
    ) -> None:
        """Restores everything from the checkpoint `path`, on every process. `position`: that of the checkpoint."""
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if self.settings.load_best_model_at_end and position.best_step is not None:
            best = self.folder / name_of(position.best_step)
            reason = broadcast_object_list([damage(best) if self.accelerator.is_main_process else None])[0]
            if reason:
                position.best_step = position.best = None
                if self.accelerator.is_main_process:
                    tell(f"the best model so far, {best}, is lost ({reason}): only evaluations from here on count")
        model = self.accelerator.unwrap_model(model)
        load_weights(path, model)
        if state["identity"]["optimizer"] == self.identity["optimizer"]:
            load_optimizer(path, model, optimizer, state["optimizer"])
        elif self.accelerator.is_main_process:
            tell("the optimizer is of a different class: its state starts empty")
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        metrics.load_state_dict(state["metrics"])
        metrics.block_nats = read_block_nats(path / BLOCK_NATS.name)
        if len(state["rng"]) == self.accelerator.num_processes:
            set_rng_state(state["rng"][self.accelerator.process_index])
        else:
            torch.manual_seed(self.settings.seed + position.step * 1000 + self.accelerator.process_index)
            if self.accelerator.is_main_process:
                new = self.accelerator.num_processes
                old = num_of(len(state["rng"]), "process")
                tell(f"the checkpoint is of {old}, this run has {new}: dropout draws new random numbers")
        self.resumed_step = position.step
        if self.mirror:
            self.mirror.resumed = True
        if self.accelerator.is_main_process and all(step <= position.step for step, _ in checkpoints_in(self.folder)):
            self._rotate_or_warn()  # a kill may have come between a save and the removal of older ones

    def end(self) -> None:
        """Waits for the mirror, and removes what was kept only for it. Call it whenever and however the run ends."""
        if self.mirror and self.mirror.path is not None and self.latest is not None:
            self.mirror.finish(self.latest, self._kept())
            self._rotate_or_warn()

    def _rotate_or_warn(self) -> None:
        try:
            self._rotate()
        except OSError as error:
            warn(f"older checkpoints cannot be removed: {one_line(error)}")

    def say_latest(self) -> str:
        """A clause for messages about a run that ends here."""
        return f"the last checkpoint is {self.latest}" if self.latest else "there is no checkpoint yet"
