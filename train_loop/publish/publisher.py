"""The exported model: weights, config, tokenizer and card in a folder, and on the hub."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from train_loop.checkpoint import Shares, flushed, unsharded_tensors
from train_loop.errors import UserError, one_line, warn
from train_loop.hub import Client
from train_loop.lora import ADAPTER, has_lora, merged, save_adapter
from train_loop.publish.model_card import inherited_metadata, model_card
from train_loop.publish.upload import upload
from train_loop.report import BLOCK_NATS, Line, Metrics
from train_loop.settings import Settings
from train_loop.whole import utf8

CARD = "README.md"
EXPORT_PARTIAL = ".export.partial"  # the folder in output_dir to which the files are written first


def export(
    folder: Path,
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    card: str,
) -> dict[str, dict]:
    """Writes everything that `from_pretrained(folder)` needs, and the model card. Returns {name: size and digest} of
    the files, except the card, which the user may edit. Raises UserError.

    The files are written to a temporary folder first and then renamed, so that a full disk leaves no half-written file.
    """
    partial, exported = folder / EXPORT_PARTIAL, {}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        if has_lora(model):
            save_adapter(model, state_dict, tokenizer, partial / ADAPTER)
            state_dict = merged(model, state_dict)
        model.save_pretrained(partial, state_dict=state_dict)
        tokenizer.save_pretrained(partial)
        (partial / CARD).write_bytes(utf8(card))
        mode = (partial / CARD).stat().st_mode  # safetensors would make its files readable by the owner only
        for path in [path for path in partial.rglob("*") if path.is_file()]:
            path.chmod(mode)
            name, place = path.relative_to(partial), folder / path.relative_to(partial)
            if name.name != CARD:
                exported[str(name)] = flushed(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    except Exception as error:  # safetensors has an error class of its own for a full disk
        raise UserError(f"the model cannot be exported to {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


class Publisher:
    """Exports the model with its card: to output_dir when the run is done, and with `hub_strategy` every_save to the
    hub after each checkpoint. Every process has one; only the main process writes.

    `repository`: the model's name on the hub; None if it is not pushed, and on the other processes.
    `held_out`: which training rows are the validation data, in words, "" if it has its own. `optimizer`: its class.
    `eval_names`: of the validation sets.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: PreTrainedTokenizerFast,
        accelerator: Accelerator,
        repository: str | None,
        held_out: str,
        optimizer: str,
        eval_names: Sequence[str] = ("validation",),
    ) -> None:
        self.settings, self.tokenizer, self.accelerator = settings, tokenizer, accelerator
        self.repository, self.held_out, self.optimizer = repository, held_out, optimizer
        self.eval_names = eval_names
        # read now, while the hub is in use anyway, and not later, when a failure could cost a trained model
        self.inherited = inherited_metadata(settings) if accelerator.is_main_process else {}
        self.pushed_folder = settings.folder / "checkpoints" / "pushed"
        self.client: Client | None = None  # of the checkpoint pushed last
        self.step: int | None = None

    def export_model(self, model: torch.nn.Module, lines: list[Line], results: dict[str, Any]) -> dict[str, dict]:
        """Writes everything that `from_pretrained(output_dir)` needs, and the model card. Call it on every process.
        Returns on the main process {name: size and digest} of the exported files and of the records that a checkpoint
        can restore, {} on the others."""
        self.end()
        is_main, unwrapped = self.accelerator.is_main_process, self.accelerator.unwrap_model(model)
        state_dict = unsharded_tensors(unwrapped, keep=is_main)
        if is_main:
            card = model_card(self, unwrapped, lines, results)
            folder = self.settings.folder
            exported = export(folder, unwrapped, state_dict, self.tokenizer, card)
            return exported | {name: flushed(folder / name) for name in ("metrics.jsonl", BLOCK_NATS.as_posix())}
        return {}

    def push_checkpoint(self, checkpoint: Path, step: int, model: torch.nn.Module, metrics: Metrics) -> None:
        """Starts to push the model of the folder `checkpoint` in a process of its own. Skips it if the previous push is
        still running. A failure is a warning: training continues."""
        if self.settings.hub_strategy != "every_save":
            return
        is_main, unwrapped = self.accelerator.is_main_process, self.accelerator.unwrap_model(model)
        # no checkpoint has the frozen weights; all processes take part in gathering them
        frozen = unsharded_tensors(unwrapped, keep=is_main, frozen_alone=True)
        if self.repository is None:
            return
        if self.client is not None and self.client.is_running():
            return warn(f"step {step} is not pushed: the push of step {self.step} is still running")
        if self.client is not None and (problem := self.client.problem()):
            warn(f"step {self.step} was not pushed: {problem}")
        began = time.perf_counter()
        try:
            shutil.rmtree(self.pushed_folder, ignore_errors=True)
            self.pushed_folder.mkdir()
            saved = Shares(checkpoint, "model")
            state_dict = frozen | {name: saved.read(name) for name in saved.pieces}
            card = model_card(self, unwrapped, metrics.lines)
            export(self.pushed_folder, unwrapped, state_dict, self.tokenizer, card)
            for name in ("metrics.jsonl", "train_config.yaml"):
                shutil.copy(self.settings.folder / name, self.pushed_folder)
            self.client = upload(self.pushed_folder, self.repository, self.settings, f"step {step}")
            self.step = step
        except Exception as error:
            warn(f"step {step} is not pushed: {one_line(error)}")
        metrics.leave_out(time.perf_counter() - began)

    def end(self) -> None:
        """Ends the push of a checkpoint that is still running, and removes its files."""
        if self.client is not None and self.client.is_running():
            self.client.end("the run ended")
        shutil.rmtree(self.pushed_folder, ignore_errors=True)
