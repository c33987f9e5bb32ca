# ruff: noqa: RUF009
"""The settings of a run: one dataclass, which `command_line.py` fills and `contradictions.py` checks.

Names and defaults are those of `transformers.TrainingArguments` and its `run_clm` scripts where they have one.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from train_loop.errors import UserError, num_of
from train_loop.settings.choices import SCHEDULES, TRACKERS
from train_loop.settings.field import FRACTION, Sources, above, at_least, one_of, setting


@dataclass
class Settings:
    """Every setting of a run. None means: the setting is off, or follows from the others."""

    model_name_or_path: str | None = setting(
        "model", None, "model to fine-tune: a name on the hub or a folder", is_path=True
    )
    config_name: str | None = setting(
        "model", None, "train from scratch: a model config's hub name, folder or .json", is_path=True
    )
    model_type: str | None = setting("model", None, "train from scratch: an architecture of transformers, e.g. gpt2")
    config_overrides: str | None = setting(
        "model", None, "with config_name or model_type: changes to the config, e.g. n_layer=4,n_embd=256"
    )
    model_revision: str | None = setting("model", None, "branch, tag or commit of the model on the hub")
    gguf_file: str | None = setting(
        "model", None, "name of a GGUF file in model_name_or_path: weights, config and tokenizer come from it"
    )
    tokenizer_name: str | None = setting(
        "model", None, "tokenizer: a name on the hub or a folder; default: the model's own", is_path=True
    )
    tokenizer_vocab_size: int | None = setting(
        "model", None, "train a byte-level BPE tokenizer of this many tokens on the training rows", **at_least(257)
    )
    cache_dir: str | None = setting(
        "model", None, "folder for downloads from the hub and prepared data; default: the usual caches", is_path=True
    )
    trust_remote_code: bool = setting("model", False, "run Python code that comes with the model. Read it first")

    dataset_name: Sources = setting(
        "data", None, "data set: a hub name, a folder, or python_docs (comes with Python); or several", is_path=True
    )
    dataset_config_name: str | None = setting("data", None, "configuration of the data set, e.g. wikitext-2-raw-v1")
    train_file: Sources = setting(
        "data",
        None,
        "training rows: txt (a line is a row), jsonl, json, csv, parquet, also as .gz; or a folder or pattern of text "
        "files (a file is a row); or several, as NAME=FILE (a recipe can give them weights)",
        is_path=True,
    )
    validation_file: Sources = setting(
        "data", None, "validation rows, likewise; the first of several sets decides which model is best", is_path=True
    )
    validation_split_percentage: int = setting(
        "data",
        5,
        "without validation data, this percentage of the training rows is held out: the last ones",
        check=lambda value: 1 <= value <= 99,
        wanted="from 1 to 99",
    )
    text_column: list[str] | None = setting(
        "data",
        None,
        "one column: texts or chats (lists of messages); two: prompts and completions. Default: text, or prompt "
        "and completion, or messages, or the only column of text",
        check=lambda names: 1 <= len({*names}) == len(names) <= 2,
        wanted="one column, or two",
    )
    completion_only_loss: bool = setting(
        "data", True, "prompts and chats: only completions and the assistant's turns are targets"
    )
    packing: bool = setting(
        "data", True, "false: each row gets a block of its own, cut at block_size or padded without targets"
    )
    add_eos_token: bool = setting("data", False, "put the end-of-text token after each row: rows are documents")
    document_attention: bool | None = setting(
        "data",
        None,
        "attention and positions begin anew with each row in a block. Default: on for prompts and chats if the model "
        "supports it, off for text. For text it needs add_eos_token",
    )
    streaming: bool = setting(
        "data",
        False,
        "tokenise and pack the training rows while training, for data larger than memory or disk: needs "
        "max_train_steps and validation data; train_file may be a pattern like 'corpus/*.jsonl'",
    )
    shuffle_buffer_size: int = setting(
        "data",
        10_000,
        "with streaming: blocks are shuffled within groups of this size; two groups are in memory; 0: not shuffled",
        **at_least(0),
    )
    block_size: int = setting("data", 128, "tokens in a block, the model's context in training", **at_least(2))
    max_train_samples: int | None = setting("data", None, "use only this many training blocks", **at_least(1))
    max_eval_samples: int | None = setting("data", None, "use only this many validation blocks", **at_least(1))
    preprocessing_num_workers: int | None = setting(
        "data", None, "tokenizer threads; default: all cores; no effect on the result", **at_least(1)
    )

    num_train_epochs: float = setting("training", 3.0, "passes over the training blocks", **above(0))
    max_train_steps: int | None = setting(
        "training", None, "optimizer steps; wins over num_train_epochs", **at_least(1)
    )
    per_device_train_batch_size: int = setting("training", 8, "blocks in a micro-batch, on each process", **at_least(1))
    gradient_accumulation_steps: int = setting(
        "training", 1, "micro-batches in an optimizer step, on each process", **at_least(1)
    )
    gradient_checkpointing: bool = setting(
        "training", False, "keep only each layer's input, recompute the rest: less memory, a third more time"
    )
    auto_micro_batch: bool = setting(
        "training", False, "if memory runs out, halve the micro-batch and double the accumulation: the same batch"
    )
    learning_rate: float = setting("training", 5e-5, "peak learning rate", **at_least(0))
    lr_scheduler_type: str = setting("training", "linear", "learning-rate schedule", **one_of(*SCHEDULES))
    lr_scheduler_kwargs: dict[str, float] | None = setting(
        "training",
        None,
        "parameters of the schedule, a mapping in a recipe, JSON on the command line, e.g. '{\"min_lr_ratio\": 0.1}'; "
        + "; ".join(f"{name}: {', '.join(known)}" for name, known in SCHEDULES.items() if known),
    )
    num_warmup_steps: float = setting(
        "training",
        0.0,
        "optimizer steps of linear warm-up; below 1: a share of all steps",
        check=lambda value: 0 <= value < 1 or (value > 0 and value.is_integer()),
        wanted="a whole number of steps, or a share from 0 to below 1",
    )
    optimizer: str = setting("training", "adamw", "muon: faster than adamw from scratch", **one_of("adamw", "muon"))
    weight_decay: float = setting("training", 0.0, "decay of the weights, on matrices only", **at_least(0))
    adam_beta1: float = setting("training", 0.9, "AdamW's first beta", **FRACTION)
    adam_beta2: float = setting("training", 0.999, "AdamW's second beta", **FRACTION)
    adam_epsilon: float = setting("training", 1e-8, "AdamW's epsilon", **above(0))
    max_grad_norm: float = setting("training", 1.0, "gradients are clipped to this norm; 0: not clipped", **at_least(0))
    load_best_model_at_end: bool = setting(
        "training", False, "export the model of the evaluation with the lowest loss; it is kept as a checkpoint"
    )
    early_stopping_patience: int | None = setting(
        "training", None, "stop after this many evaluations in a row that did not lower the loss", **at_least(1)
    )
    early_stopping_threshold: float = setting(
        "training", 0.0, "nats per token by which an evaluation must beat the best to count as lower", **at_least(0)
    )
    label_smoothing_factor: float = setting(
        "training", 0.0, "share of each target's probability that is spread over the vocabulary", **FRACTION
    )
    seed: int = setting("training", 42, "seed of weights, dropout and the order of blocks", **at_least(0))
    num_threads: int | None = setting(
        "training", None, "CPU threads of each process; default: its share of the cores", **at_least(1)
    )

    lora_r: int | None = setting("training", None, "rank of LoRA's matrices beside the frozen weights", **at_least(1))
    lora_alpha: int = setting("training", 32, "LoRA's product is scaled by lora_alpha / lora_r", **at_least(1))
    lora_dropout: float = setting("training", 0.0, "dropout on the input of LoRA's matrices", **FRACTION)
    lora_target_modules: list[str] | None = setting(
        "training", None, "names of the linear layers that get LoRA's matrices; default: all except the head"
    )
    tf32: bool = setting("training", False, "a GPU computes float32 products in TF32: faster, with 10 bits of mantissa")
    deterministic: bool = setting(
        "training", False, "on a GPU, use only kernels that give the same bits each time: slower. A CPU always does"
    )
    peak_tflops: float | None = setting(
        "training", None, "dense TFLOP/s of a device, for mfu; known for some NVIDIA GPUs", **above(0)
    )
    tuning: bool = setting(
        "training", True, "allocator, huge pages, threads and lean modules: faster; the last digits may differ"
    )

    per_device_eval_batch_size: int = setting(
        "evaluation", 8, "validation blocks at once, on each process", **at_least(1)
    )
    eval_steps: int | None = setting(
        "evaluation", None, "optimizer steps between evaluations; default: one evaluation per epoch", **at_least(1)
    )
    eval_delay: float = setting(
        "evaluation",
        0.0,
        "no evaluation before this many steps (with eval_steps) or epochs; the last one is always made",
        **at_least(0),
    )
    eval_stride: int | None = setting(
        "evaluation", None, "slide the window by this many tokens; default: block_size, no overlap", **at_least(1)
    )
    named_perplexities: bool = setting(
        "evaluation", False, "also bits_per_byte and perplexities per word, comparable between tokenizers"
    )
    sample_prompt: list[str] | None = setting(
        "evaluation", None, "with each evaluation, show how the model continues this text, or these texts"
    )
    eval_only: bool = setting("evaluation", False, "evaluate the model and stop")

    dry_run: bool = setting(
        "output", False, "print how much memory and time the run will need, measured in a few steps, and stop"
    )
    output_dir: str | None = setting("output", None, "folder for the model and the records of the run", is_path=True)
    overwrite_output_dir: bool = setting("output", False, "delete what an earlier run left in output_dir")
    logging_steps: int = setting("output", 500, "optimizer steps between lines of training loss", **at_least(1))
    logging_first_step: bool = setting("output", False, "also log a line of training loss after the first step")
    report_to: list[str] | None = setting(
        "output",
        None,
        "trackers that also get the lines of metrics.jsonl",
        check=lambda names: names in (["all"], ["none"]) or set(names) <= set(TRACKERS),
        wanted=f"all, none (the default), or some of {', '.join(TRACKERS)}",
    )
    run_name: str | None = setting("output", None, "the run's name in trackers; default: the name of output_dir")
    checkpointing_steps: str = setting(
        "checkpoints",
        "epoch",
        "optimizer steps between checkpoints",
        check=lambda value: value in ("epoch", "none") or (value.isdecimal() and int(value) > 0),
        wanted="a number, epoch or none",
    )
    save_minutes: float | None = setting(
        "checkpoints",
        None,
        "also save when the last checkpoint is this old (checkpointing_steps none: only then)",
        **above(0),
    )
    max_minutes: float | None = setting(
        "checkpoints", None, "time budget, from the program's start: then save, evaluate, export and stop", **above(0)
    )
    mirror: str | None = setting(
        "checkpoints",
        None,
        "folder or fsspec address (s3://...) for a copy of each checkpoint, made in the background. auto resumes from "
        "it if output_dir has none",
        is_path=True,
    )
    checkpoints_total_limit: int | None = setting(
        "checkpoints", 2, "newest checkpoints to keep; the one with the best validation loss is kept too", **at_least(1)
    )
    resume_from_checkpoint: str | None = setting(
        "checkpoints",
        None,
        "auto: the newest complete one in output_dir, if any; or a checkpoint's folder",
        is_path=True,
    )
    resume_with_changes: bool = setting(
        "checkpoints", False, "resume with new settings that change the result: more epochs, a new learning rate"
    )
    ddp_timeout: int = setting(
        "checkpoints", 600, "seconds that a process waits for its peers before it gives up", **at_least(1)
    )
    traceback: bool = setting("output", False, "show Python's traceback with an error")

    push_to_hub: bool = setting(
        "publishing", False, "push the exported model to the hub; the token comes from HF_TOKEN or `hf auth login`"
    )
    hub_model_id: str | None = setting(
        "publishing", None, "repository to push to, owner/name or name; default: that of output_dir, under yours"
    )
    hub_private_repo: bool = setting("publishing", False, "make a new repository private")
    hub_strategy: str = setting(
        "publishing",
        "end",
        "when to push: at the end, or also the model of each checkpoint, in the background",
        **one_of("end", "every_save"),
    )

    @property
    def folder(self) -> Path:
        """output_dir as a path."""
        assert self.output_dir is not None  # every run that trains has one (`contradictions`)
        return Path(self.output_dir)

    def blocks_per_step(self, world_size: int) -> int:
        """Blocks of an optimizer step, of all processes together; the last one of an epoch may be a short one."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size

    def steps_per_epoch(self, num_blocks: int | None, world_size: int) -> int | None:
        """Optimizer steps in an epoch of `num_blocks` blocks; the last step may be a short one. None for a stream,
        whose number of blocks is unknown (None)."""
        return None if num_blocks is None else math.ceil(num_blocks / self.blocks_per_step(world_size))

    def num_steps(self, num_blocks: int | None, world_size: int) -> int:
        """Optimizer steps of the run, with epochs of `num_blocks` blocks. Raises UserError if the first evaluation
        would come after its end."""
        per_epoch = self.steps_per_epoch(num_blocks, world_size)
        # a stream has no length of an epoch, and needs max_train_steps (`contradictions`)
        steps = self.max_train_steps or math.ceil(self.num_train_epochs * per_epoch)  # type: ignore[operator]
        delay = self.eval_delay * (1 if self.eval_steps else per_epoch or 0)
        if delay > steps:
            ends = f"the run has {num_of(steps, 'step')}"
            raise UserError(f"eval_delay {self.eval_delay:g} is {delay:,.0f} steps, but {ends}")
        return steps


def as_recipe(settings: Settings) -> str:
    """Every setting as YAML, which `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)
