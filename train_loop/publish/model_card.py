"""The README.md of an exported folder."""

import dataclasses
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from huggingface_hub import DatasetCard, EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from train_loop.errors import num_of
from train_loop.files import file_kind
from train_loop.hub import is_hub_name
from train_loop.lora import ADAPTER, num_parameters
from train_loop.process import code_version
from train_loop.report import Line, of_each_set
from train_loop.settings import Settings, sources_of, validation_sets_of, weights_of
from train_loop.whole import utf8


class Published(Protocol):
    """What a card needs to know about a run; `Publisher` provides it."""

    settings: Settings
    accelerator: Accelerator
    repository: str | None  # on the hub, None if it is not pushed
    held_out: str  # which training rows are the validation data, in words
    optimizer: str  # its class
    eval_names: Sequence[str]  # of the validation sets
    inherited: dict[str, Any]  # from the cards of the base model and the data set


METRICS = {  # key of an evaluation line: name on the card
    "eval_loss": "loss",
    "perplexity": "perplexity",
    "word_perplexity": "word_perplexity",
    "word_eos_perplexity": "word_eos_perplexity",
    "bits_per_byte": "bits_per_byte",
}  # in the order of the card


def inherited_metadata(settings: Settings) -> dict[str, Any]:
    """What the new card inherits from cards on the hub: the base model's license, the data's language. Empty if there
    are no such cards or entries."""
    found: dict[str, Any] = {}
    if is_hub_name(settings.model_name_or_path):
        found |= _card_data(ModelCard, settings.model_name_or_path, ("license", "license_name", "license_link"))
    data_sets = [source.dataset_name for source in sources_of(settings).values()]
    if len(data_sets) == 1 and is_hub_name(data_sets[0]):  # with several, no single language holds
        found |= _card_data(DatasetCard, data_sets[0], ("language",))
    return found


def _card_data(kind: type[ModelCard] | type[DatasetCard], name: str, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        data = kind.load(name, ignore_metadata_errors=True).data
    except Exception:  # no card, no hub, or no metadata
        return {}
    return {key: value for key in keys if (value := data.get(key)) is not None}


def model_card(
    publisher: Published, model: PreTrainedModel, lines: list[Line], results: dict[str, Any] | None = None
) -> str:
    """The README.md of an exported folder, as text: the hub's metadata, losses, use, and how the model was made.

    `lines`: of metrics.jsonl; `results`: of the finished run, else None.
    """
    s, repository = publisher.settings, publisher.repository
    evaluations = [line for line in lines if "eval_loss" in line]
    exported_step, choice = (results or {}).get("exported_step"), ""
    # {}: the record is lost; the model must still be exported
    last = next((line for line in reversed(evaluations) if exported_step in (None, line["step"])), {})
    if results and exported_step and last:
        num = sum(line["step"] > 0 for line in evaluations)
        after = f"after the last step, {results['step']:,}, it was {results['last_eval_loss']:.4f}"
        choice = f"\nThis is the model with the lowest validation loss of {num_of(num, 'evaluation')}; {after}."
    metrics = {METRICS[name]: last[name] for name in METRICS if name in last}
    digits = {"perplexity": 2, "word_perplexity": 2, "word_eos_perplexity": 2}
    shown = ", ".join(f"{n.replace('_', ' ')} {value:,.{digits.get(n, 4)}f}" for n, value in metrics.items())

    title = Path(repository or s.folder.resolve()).name
    place = s.output_dir
    if repository:
        place = repository if "/" in repository else f"OWNER/{repository}"
    num_exported = num_parameters(model)
    origin = "trained from random weights"
    if s.model_name_or_path:
        origin = f"fine-tuned from `{s.model_name_or_path}`" + (f" ({s.gguf_file})" if s.gguf_file else "")
    adapter = ""
    if s.lora_r:
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        origin += " with LoRA"
        adapter = f"""
{num_trained:,} parameters were trained: LoRA matrices of rank {s.lora_r}, which are merged into this model. They stand
alone in the folder `{ADAPTER}`, for [peft](https://github.com/huggingface/peft).
"""
    most = f"at most {num_of(s.max_eval_samples, 'block')} (max_eval_samples)" if s.max_eval_samples else ""
    validated = "".join(f" {part}," for part in (publisher.held_out, most) if part)
    validated = f" on{validated}" if validated else ""
    first, *others = publisher.eval_names
    if others:
        validated = f" on {first}" + (f" ({validated.removeprefix(' on ').rstrip(',')})" if validated else "")
    named = ""
    if last and s.named_perplexities:
        words, ends, size = (f"{last[name]:,}" for name in ("eval_words", "eval_line_ends", "eval_bytes"))
        named = f"""
Word perplexity and bits per byte are of the text of the evaluated blocks: {words} words, {size} bytes.
Word eos perplexity also counts its {ends} line ends as words.
Special tokens that stand for no text are not counted in them."""
    validation = "There is no record of an evaluation."
    if last:
        steps, tokens = last["step"], last["eval_tokens"]
        validation = (
            f"Validation{validated} after {num_of(steps, 'optimizer step')}: {shown}, over {num_of(tokens, 'token')}."
        )
        for name, (loss, perplexity) in list(of_each_set(last, publisher.eval_names).items())[1:]:
            tokens = last.get(f"eval_{name}_tokens", 0)
            validation += (
                f"\nOn {name}: loss {loss:,.4f}, perplexity {perplexity:,.2f}, over {num_of(tokens, 'token')}."
            )
    context = f"begins anew every {s.block_size} tokens"
    if s.eval_stride:
        context = f"is of up to {s.block_size} tokens, in a window that moves by {s.eval_stride}"
    curve = "\n![training and validation loss](loss_curve.png)\n" if results else ""  # drawn when the run is done
    return f"""---
{_metadata(publisher, title, metrics, last)}
---

# {title}

A causal language model ({model.config.model_type}, {num_exported:,} parameters), {origin} on {_data(s)}.
{adapter}
{validation}
Loss (in nats) and perplexity are per token of this model's tokenizer, and the context {context}:
compare them only with numbers that were measured in the same way.{named}{choice}

{_table(lines, publisher.eval_names)}

The training loss is the mean since the line before it in [metrics.jsonl](metrics.jsonl).
{curve}
## Use

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{place}")
print(generate("The value of", max_new_tokens=50)[0]["generated_text"])
```

## Training

{_how_it_was_made(publisher, results)}

[train_config.yaml](train_config.yaml) has every setting.
"""


def _data(s: Settings) -> str:
    """What the model was trained on, in words."""
    sources, weights = sources_of(s), weights_of(s)
    texts = []
    for name, source in sources.items():
        text = str(source.dataset_name or Path(str(source.train_file)).name)
        text += f" ({source.dataset_config_name})" if source.dataset_config_name else ""
        texts.append(f"{text} ({weights[name]:.1%} of the blocks)" if weights else text)
    return " and ".join(texts)


def _places(value: str | list[Any]) -> str:
    """A file without its folder, or a data set's name; for several, each name and its other entries."""
    if isinstance(value, str):
        return value if is_hub_name(value) else Path(value).name
    said = []
    for item in value:
        others = {k: Path(v).name if k.endswith("_file") else v for k, v in item.items() if k != "name"}
        said.append(f"{item['name']} ({', '.join(f'{k} {v}' for k, v in others.items())})")
    return ", ".join(said)


def _metadata(publisher: Published, title: str, metrics: dict[str, float], last: Line) -> str:
    """What the hub reads, as YAML. `metrics`: of the first validation set; `last`: the evaluation."""
    s, sources = publisher.settings, sources_of(publisher.settings)
    data_sets = [str(one.dataset_name) for one in sources.values() if is_hub_name(one.dataset_name)]
    first, *others = publisher.eval_names
    of_each = of_each_set(last, publisher.eval_names)
    results = {first: metrics} | {n: dict(zip(("loss", "perplexity"), of_each[n], strict=True)) for n in others}
    evaluated = {"validation": next(iter(sources.values()), s)} | sources | validation_sets_of(s)
    found = []
    for name, values in results.items():
        one = evaluated.get(name, s)
        file = utf8(str(one.validation_file or one.train_file or "")).decode()  # YAML would escape it differently
        found += [
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=str(one.dataset_name or file_kind(file) or "text"),
                dataset_name=name if others else str(one.dataset_name or Path(file).name),
                dataset_config=one.dataset_config_name,
                metric_type=metric,
                metric_name=metric,
                metric_value=round(value, 6),
            )
            for metric, value in values.items()
            if math.isfinite(value)
        ]
    return ModelCardData(
        model_name=title,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["causal-lm", "train_loop"],
        base_model=s.model_name_or_path if is_hub_name(s.model_name_or_path) else None,
        datasets=data_sets or None,
        eval_results=found,
        **publisher.inherited,
    ).to_yaml()


def _table(lines: list[Line], eval_names: Sequence[str]) -> str:
    of_sets = [f"{n}: loss | {n}: perplexity" for n in eval_names]
    if len(eval_names) == 1:
        of_sets = ["validation loss | perplexity"]
    rows = [f"| step | epoch | training loss | {' | '.join(of_sets)} |", "|---:" * (3 + 2 * len(of_sets)) + "|"]
    train_loss = ""
    for line in lines:
        train_loss = f"{line['loss']:.4f}" if "loss" in line else train_loss
        if "eval_loss" in line:
            of_each = of_each_set(line, eval_names).values()
            cells = [f"{line['step']:,}", f"{line['epoch']:.2f}", train_loss]
            cells += [f"{loss:.4f} | {perplexity:,.2f}" for loss, perplexity in of_each]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _how_it_was_made(publisher: Published, results: dict[str, Any] | None) -> str:
    """The settings that had an effect, the machine, time and versions, as a list."""
    s, accelerator = publisher.settings, publisher.accelerator
    has_no_effect = {
        "num_train_epochs": s.max_train_steps,
        "validation_split_percentage": not publisher.held_out,
        "early_stopping_threshold": not s.early_stopping_patience,
        "shuffle_buffer_size": not s.streaming,
        "lora_alpha": not s.lora_r,
        "lora_dropout": not s.lora_r,
    }
    made = {
        f.name: _places(value) if f.name in ("train_file", "validation_file", "dataset_name") else value
        for f in dataclasses.fields(s)
        if f.metadata["group"] in ("data", "training") and not has_no_effect.get(f.name)
        if (value := getattr(s, f.name)) is not None and value is not False
    }
    W, device = accelerator.num_processes, accelerator.device
    num_blocks = s.blocks_per_step(W)
    made["optimizer"] = (
        f"{publisher.optimizer}, {num_of(num_blocks, 'block')} = {num_blocks * s.block_size:,} tokens in a step"
    )
    made["precision"] = accelerator.mixed_precision.replace("no", "float32")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    made["hardware"] = f"{num_of(W, 'process')} on {name}"
    if results:
        made["time"] = f"{results['train_runtime']:,.0f} seconds for {num_of(results['train_tokens'], 'target token')}"
    packages = "torch", "transformers", "accelerate", "datasets"
    versions = [f"train_loop {code_version()}", *(f"{package} {version(package)}" for package in packages)]
    made["versions"] = ", ".join(versions)
    return "\n".join(f"- {name}: {value}" for name, value in made.items())
