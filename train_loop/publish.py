"""The folder that a run leaves: looked at before anything slow, filled at the end with weights, config, tokenizer,
model card and settings."""

import dataclasses
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import yaml

from train_loop.data import one_line


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
    path.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(settings)
    partial = path / ".train_config.partial"
    partial.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    os.replace(partial, path / "train_config.yaml")


def is_finished(output_dir, step=None):
    """Whether the run in `output_dir` was exported, with `step` as its last step if that is given."""
    try:
        results = json.loads((Path(output_dir) / "all_results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return step is None or results.get("step") == step


def export(model, tokenizer, lines, results, settings, accelerator):
    """Writes everything that `from_pretrained(output_dir)` needs, and the model card. Called on every process; the
    main one writes.

    The files are written to a folder of their own first and then renamed, so that a full disk leaves none half-written.
    """
    state_dict = accelerator.get_state_dict(model)  # on every process: sharded weights are gathered
    if not accelerator.is_main_process:
        return
    output_dir = Path(settings.output_dir)
    partial = output_dir / ".export.partial"
    model = accelerator.unwrap_model(model)
    model.config.use_cache = True
    try:
        model.save_pretrained(partial, state_dict=state_dict)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(model, lines, results, settings), encoding="utf-8")
        for path in partial.iterdir():
            os.replace(path, output_dir / path.name)
    except Exception as error:  # safetensors has an error class of its own for a full disk
        raise OSError(f"the model cannot be exported to {output_dir}: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def model_card(model, lines, results, settings):
    """The README.md of the exported folder, with the front matter that the hub reads."""
    data = settings.dataset_name or settings.train_file
    name = Path(settings.output_dir).name
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["causal-lm", "train_loop"]}
    if settings.model_name_or_path:
        front["base_model"] = settings.model_name_or_path
    train_loss, rows = None, []
    for line in lines:
        train_loss = line.get("loss", train_loss)
        if "eval_loss" in line:
            shown = "" if train_loss is None else f"{train_loss:.4f}"
            cells = (
                line["step"],
                f"{line['epoch']:.2f}",
                shown,
                f"{line['eval_loss']:.4f}",
                f"{line['perplexity']:.2f}",
            )
            rows.append(f"| {' | '.join(map(str, cells))} |")
    base = f"[{settings.model_name_or_path}]" if settings.model_name_or_path else "random weights"
    parameters = sum(p.numel() for p in model.parameters())
    hyperparameters = "\n".join(
        f"- {f.name}: {getattr(settings, f.name)}"
        for f in dataclasses.fields(settings)
        if getattr(settings, f.name) is not None and f.metadata["group"] in ("data", "training")
    )
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("torch", "transformers", "accelerate", "datasets")
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

A causal language model ({model.config.model_type}, {parameters:,} parameters), trained from {base} on {data}
in blocks of {settings.block_size} tokens.

Validation loss {results["eval_loss"]:.4f} nats per token, perplexity {results["perplexity"]:.2f}, over
{results["eval_tokens"]:,} tokens (per token of this tokenizer; the context starts anew with each block).

| step | epoch | training loss | validation loss | perplexity |
|---|---|---|---|---|
{chr(10).join(rows)}

The training loss is the mean since the line before it in metrics.jsonl.

![training and validation loss](loss_curve.png)

## Use

```python
from transformers import pipeline

print(pipeline("text-generation", "{name}")("The value of", max_new_tokens=50)[0]["generated_text"])
```

## Training

{hyperparameters}

{results["train_tokens"]:,} target tokens in {results["train_runtime"]:.0f} seconds. Made with {versions}.
"""
