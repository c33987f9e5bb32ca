"""The folder that a run leaves: looked at before anything slow, filled at the end with weights, config, tokenizer,
model card and settings."""

import dataclasses
import json
import math
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import DatasetCard, EvalResult, ModelCard, ModelCardData

from train_loop import hub
from train_loop.config import as_recipe, file_kind
from train_loop.data import one_line
from train_loop.model import save_model
from train_loop.sharded import Shares, whole_tensors

METRICS = {  # of an evaluation line: the name that people know it by
    "eval_loss": "loss",
    "perplexity": "perplexity",
    "word_perplexity": "word_perplexity",
    "bits_per_byte": "bits_per_byte",
}  # in the order of the card


def check_output_dir(settings):
    """Raises ValueError where output_dir cannot take a new run. Changes nothing."""
    if not settings.output_dir:
        return
    path = Path(settings.output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir {path} is a file")
    is_run = (path / "train_config.yaml").is_file()
    resuming = settings.resume_from_checkpoint and is_run
    if path.is_dir() and any(path.iterdir()) and not settings.overwrite_output_dir and not resuming:
        way_on = "--resume_from_checkpoint auto to go on with the run in it, or " if is_run else ""
        raise ValueError(
            f"output_dir {path} is not empty: choose another, or give {way_on}--overwrite_output_dir to delete what "
            "is in it"
        )
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        raise ValueError(f"output_dir {path} cannot be written: no permission in {place}")


def create_output_dir(settings, resuming=False):
    """output_dir with the settings in it, and empty but for them unless `resuming`. Called once the model and the data
    are known to be good."""
    path = Path(settings.output_dir)
    if settings.resume_from_checkpoint and not resuming and is_finished(path):
        raise ValueError(f"output_dir {path} holds a finished run without checkpoints: there is nothing to go on from")
    if settings.resume_from_checkpoint and not resuming:  # what a run left that was killed before its first checkpoint
        (path / "metrics.jsonl").unlink(missing_ok=True)
    if settings.overwrite_output_dir and path.is_dir():
        for entry in path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"output_dir {path} cannot be made: {error.strerror}") from error
    partial = path / ".train_config.partial"
    partial.write_text(as_recipe(settings), encoding="utf-8")
    os.replace(partial, path / "train_config.yaml")


def is_finished(output_dir, step=None):
    """Whether the run in `output_dir` was exported, with `step` as its last step if that is given."""
    try:
        results = json.loads((Path(output_dir) / "all_results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return step is None or results.get("step") == step


def export(folder, model, state_dict, tokenizer, card):
    """Writes everything that `from_pretrained(folder)` needs, and the model card. Raises OSError.

    The files are written to a folder of their own first and then renamed, so that a full disk leaves none half-written.
    """
    partial = folder / ".export.partial"
    try:
        save_model(model, state_dict, partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        mode = (partial / "README.md").stat().st_mode  # of any new file; safetensors lets nobody else read its own
        for path in [path for path in partial.rglob("*") if path.is_file()]:
            path.chmod(mode)
            place = folder / path.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    except Exception as error:  # safetensors has an error class of its own for a full disk
        raise OSError(f"the model cannot be exported to {folder}: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Publisher:
    """The model of a run as others load it, with its card: in output_dir when the run is done, and with `hub_strategy`
    every_save on the hub after each checkpoint. Every process has one; the main one writes.

    `repository`: the model's name on the hub, None where it is not pushed, and on the other processes.
    `held_out`: which training rows are the validation data, in words, "" if it has its own.
    """

    def __init__(self, settings, tokenizer, accelerator, repository, held_out):
        self.settings, self.tokenizer, self.accelerator = settings, tokenizer, accelerator
        self.repository, self.held_out = repository, held_out
        # asked for now, when the hub has just been asked for the model, and not when there is something to lose
        self.inherited = inherited_metadata(settings) if accelerator.is_main_process else {}
        self.pushes_checkpoints = settings.hub_strategy == "every_save" and repository is not None
        self.pushed_folder = Path(settings.output_dir) / "checkpoints" / "pushed"
        self.client = self.step = None  # of the checkpoint pushed last

    def export_model(self, model, lines, results):
        """Writes everything that `from_pretrained(output_dir)` needs, and the model card. Called on every process."""
        is_main, model = self.accelerator.is_main_process, self.accelerator.unwrap_model(model)
        state_dict = whole_tensors(model, keep=is_main)
        if is_main:
            card = model_card(self, model, lines, results)
            export(Path(self.settings.output_dir), model, state_dict, self.tokenizer, card)

    def push_checkpoint(self, checkpoint, step, model, metrics):
        """Begins to push the model of the folder `checkpoint` in a process of its own, or leaves it out where the push
        before it is not over. Whatever goes wrong is a warning: training goes on."""
        if not self.pushes_checkpoints:
            return
        if self.client is not None and self.client.is_running():
            return hub.warn(f"step {step} is not pushed: the push of step {self.step} is not over")
        if self.client is not None and (problem := self.client.problem()):
            hub.warn(f"step {self.step} was not pushed: {problem}")
        began = time.perf_counter()
        try:
            shutil.rmtree(self.pushed_folder, ignore_errors=True)
            self.pushed_folder.mkdir()
            model, saved = self.accelerator.unwrap_model(model), Shares(checkpoint, "model")
            state_dict = {name: saved.read(name) for name in saved.pieces}
            card = model_card(self, model, metrics.lines)
            export(self.pushed_folder, model, state_dict, self.tokenizer, card)
            for name in ("metrics.jsonl", "train_config.yaml"):
                shutil.copy(Path(self.settings.output_dir) / name, self.pushed_folder)
            self.client = hub.upload(self.pushed_folder, self.repository, self.settings, f"step {step}")
            self.step = step
        except Exception as error:
            hub.warn(f"step {step} is not pushed: {one_line(error)}")
        metrics.leave_out(time.perf_counter() - began)

    def end(self):
        """Gives up the push of a checkpoint that is not over, and the space that it took."""
        if self.client is not None and self.client.is_running():
            self.client.end("the run ended")
        shutil.rmtree(self.pushed_folder, ignore_errors=True)


def inherited_metadata(settings):
    """What the cards on the hub say that holds for the new model too: the license of the model that it is made from,
    the language of the data. Empty where there are no cards, or they do not say."""
    found = {}
    if hub.is_hub_name(settings.model_name_or_path):
        found |= _card_data(ModelCard, settings.model_name_or_path, ("license", "license_name", "license_link"))
    if hub.is_hub_name(settings.dataset_name):
        found |= _card_data(DatasetCard, settings.dataset_name, ("language",))
    return found


def _card_data(kind, name, keys):
    try:
        data = kind.load(name, ignore_metadata_errors=True).data
    except Exception:  # no card, no hub, no metadata: nothing is known
        return {}
    return {key: value for key in keys if (value := data.get(key)) is not None}


def model_card(publisher, model, lines, results=None):
    """The README.md of an exported folder, as text: the metadata that the hub reads, losses, use, how it was made.

    `lines`: of metrics.jsonl; `results`: of the finished run, None before it is.
    """
    s, accelerator, repository = publisher.settings, publisher.accelerator, publisher.repository
    evaluations = [line for line in lines if "eval_loss" in line]
    last = evaluations[-1]
    if exported_step := (results or {}).get("exported_step"):
        last = next(line for line in reversed(evaluations) if line["step"] == exported_step)
    title = Path(repository or Path(s.output_dir).resolve()).name
    data = s.dataset_name or Path(s.train_file).name
    eval_file = s.validation_file or s.train_file
    metrics = {METRICS[name]: last[name] for name in METRICS if name in last}
    metadata = ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["causal-lm", "train_loop"],
        base_model=s.model_name_or_path if hub.is_hub_name(s.model_name_or_path) else None,
        datasets=[s.dataset_name] if hub.is_hub_name(s.dataset_name) else None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=s.dataset_name or file_kind(eval_file) or "text",
                dataset_name=s.dataset_name or Path(eval_file).name,
                dataset_config=s.dataset_config_name,
                metric_type=name,
                metric_name=name,
                metric_value=round(value, 6),
            )
            for name, value in metrics.items()
            if math.isfinite(value)
        ],
        **publisher.inherited,
    )

    num_parameters = sum(p.numel() for p in model.parameters())
    gguf = f" ({s.gguf_file})" if s.gguf_file else ""
    origin = (
        f"fine-tuned from `{s.model_name_or_path}`{gguf}" if s.model_name_or_path else "trained from random weights"
    )
    config = f" ({s.dataset_config_name})" if s.dataset_config_name else ""
    digits = {"perplexity": 2, "word_perplexity": 2}
    shown = ", ".join(f"{n.replace('_', ' ')} {value:,.{digits.get(n, 4)}f}" for n, value in metrics.items())
    held_out = f" on {publisher.held_out}," if publisher.held_out else ""
    context = f"begins anew every {s.block_size} tokens"
    if s.eval_stride:
        context = f"is of up to {s.block_size} tokens, in a window that moves by {s.eval_stride}"
    choice = ""
    if exported_step:
        num = sum(line["step"] > 0 for line in evaluations)
        after = f"after the last step, {results['step']:,}, it was {results['last_eval_loss']:.4f}"
        choice = f"\nThis is the model with the lowest validation loss of {num} evaluations; {after}."
    table, train_loss = [], ""
    for line in lines:
        train_loss = f"{line['loss']:.4f}" if "loss" in line else train_loss
        if "eval_loss" in line:
            cells = f"{line['step']:,}", f"{line['epoch']:.2f}", train_loss, f"{line['eval_loss']:.4f}"
            table.append(f"| {' | '.join(cells)} | {line['perplexity']:,.2f} |")
    place = s.output_dir
    if repository:
        place = repository if "/" in repository else f"OWNER/{repository}"

    has_no_effect = {
        "num_train_epochs": s.max_train_steps,
        "validation_split_percentage": not held_out,
        "early_stopping_threshold": not s.early_stopping_patience,
        "shuffle_buffer_size": not s.streaming,
    }
    made = {
        f.name: Path(value).name if f.name.endswith("_file") else value
        for f in dataclasses.fields(s)
        if f.metadata["group"] in ("data", "training") and not has_no_effect.get(f.name)
        if (value := getattr(s, f.name)) is not None and value is not False
    }
    W, device = accelerator.num_processes, accelerator.device
    num_blocks = s.per_device_train_batch_size * s.gradient_accumulation_steps * W
    made["optimizer"] = f"AdamW, {num_blocks:,} blocks = {num_blocks * s.block_size:,} tokens in a step"
    made["precision"] = accelerator.mixed_precision.replace("no", "float32")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    made["hardware"] = f"{W} process{'es' if W > 1 else ''} on {name}"
    if results:
        made["time"] = f"{results['train_runtime']:,.0f} seconds for {results['train_tokens']:,} target tokens"
    packages = "torch", "transformers", "accelerate", "datasets"
    made["versions"] = ", ".join(f"{package} {version(package)}" for package in packages)
    listed = "\n".join(f"- {name}: {value}" for name, value in made.items())

    curve = "\n![training and validation loss](loss_curve.png)\n" if results else ""  # drawn when the run is done
    return f"""---
{metadata.to_yaml()}
---

# {title}

A causal language model ({model.config.model_type}, {num_parameters:,} parameters), {origin} on {data}{config}.

Validation{held_out} after {last["step"]:,} optimizer steps: {shown}, over {last["eval_tokens"]:,} tokens.
Loss (in nats) and perplexity are per token of this model's tokenizer, and the context {context}:
compare them only with numbers that were measured in the same way.{choice}

| step | epoch | training loss | validation loss | perplexity |
|---:|---:|---:|---:|---:|
{chr(10).join(table)}

The training loss is the mean since the line before it in [metrics.jsonl](metrics.jsonl).
{curve}
## Use

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{place}")
print(generate("The value of", max_new_tokens=50)[0]["generated_text"])
```

## Training

{listed}

[train_config.yaml](train_config.yaml) has every setting.
"""
