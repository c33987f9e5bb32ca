"""The settings of a run: one dataclass, filled from defaults, then a recipe (YAML), then the command line.

Names and defaults are those of `transformers.TrainingArguments` and its `run_clm` scripts where they have one.
`read_settings` reports every problem of the recipe and the command line in one error, before anything slow happens.
This module imports nothing heavy, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import dataclasses
import difflib
import glob
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import yaml

RECIPES = Path(__file__).parent / "recipes"
FILE_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
# Accelerate has a class for each of these, and each is the name of the library to import
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


def setting(group, default, help, check=None, wanted=""):
    """A field of `Settings`: `check(value)` must hold for every value but None, and `wanted` says so in words."""
    return field(default=default, metadata={"group": group, "help": help, "check": check, "wanted": wanted})


def at_least(low):
    return {"check": lambda value: value >= low, "wanted": f"at least {low}"}


def above(low):
    return {"check": lambda value: value > low, "wanted": f"above {low}"}


def one_of(*names):
    return {"check": lambda value: value in names, "wanted": "one of " + ", ".join(names)}


FRACTION = {"check": lambda value: 0 <= value < 1, "wanted": "at least 0 and below 1"}


@dataclass
class Settings:
    """Every setting of a run. A value is None where the setting is off or is worked out from the others."""

    model_name_or_path: str | None = setting("model", None, "model to fine-tune: a name on the hub or a folder")
    config_name: str | None = setting("model", None, "train from scratch: a model config's hub name, folder or .json")
    model_type: str | None = setting("model", None, "train from scratch: an architecture of transformers, e.g. gpt2")
    config_overrides: str | None = setting(
        "model", None, "with config_name or model_type: changes to the config, e.g. n_layer=4,n_embd=256"
    )
    model_revision: str | None = setting("model", None, "branch, tag or commit of the model on the hub")
    gguf_file: str | None = setting(
        "model", None, "name of a GGUF file in model_name_or_path: weights, config and tokenizer come from it"
    )
    tokenizer_name: str | None = setting("model", None, "tokenizer's hub name or folder; else the model's own")
    tokenizer_vocab_size: int | None = setting(
        "model", None, "train a byte-level BPE tokenizer of this many tokens on the training rows", **at_least(257)
    )
    trust_remote_code: bool = setting("model", False, "run Python code that comes with the model: only if you read it")

    dataset_name: str | None = setting(
        "data", None, "data set: a name on the hub, a folder, or python_docs (comes with Python)"
    )
    dataset_config_name: str | None = setting("data", None, "configuration of the data set, e.g. wikitext-2-raw-v1")
    train_file: str | None = setting(
        "data",
        None,
        "training rows: txt (a line is a row), jsonl, json, csv, parquet; .gz; or a folder or pattern of text files, "
        "each of which is a row",
    )
    validation_file: str | None = setting("data", None, "validation rows, likewise")
    validation_split_percentage: int = setting(
        "data",
        5,
        "percent of the training rows, the last ones, held out where no validation data is given",
        check=lambda value: 1 <= value <= 99,
        wanted="from 1 to 99",
    )
    text_column: str | None = setting("data", None, "column that holds the text; else 'text', or the only one of text")
    add_eos_token: bool = setting("data", False, "put the end-of-text token after each row: rows are documents")
    document_attention: bool = setting(
        "data", False, "with add_eos_token: attention and positions begin anew with each document in a block"
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
        "with streaming: blocks are shuffled within groups of so many, twice of which are in memory; 0: not shuffled",
        **at_least(0),
    )
    block_size: int = setting("data", 128, "tokens in a block, the model's context in training", **at_least(2))
    max_train_samples: int | None = setting("data", None, "use only this many training blocks", **at_least(1))
    max_eval_samples: int | None = setting("data", None, "use only this many validation blocks", **at_least(1))
    preprocessing_num_workers: int | None = setting(
        "data", None, "tokenizer threads; else all cores; does not change the result", **at_least(1)
    )

    num_train_epochs: float = setting("training", 3.0, "passes over the training blocks", **above(0))
    max_train_steps: int | None = setting(
        "training", None, "optimizer steps; wins over num_train_epochs", **at_least(1)
    )
    per_device_train_batch_size: int = setting("training", 8, "blocks in a micro-batch, on each process", **at_least(1))
    gradient_accumulation_steps: int = setting(
        "training", 1, "micro-batches in an optimizer step, on each process", **at_least(1)
    )
    auto_micro_batch: bool = setting(
        "training", False, "where memory runs out, halve the micro-batch and double the accumulation: the same losses"
    )
    learning_rate: float = setting("training", 5e-5, "peak learning rate", **at_least(0))
    lr_scheduler_type: str = setting("training", "linear", "learning-rate schedule", **one_of(*SCHEDULES))
    num_warmup_steps: int = setting("training", 0, "optimizer steps of linear warm-up", **at_least(0))
    weight_decay: float = setting("training", 0.0, "AdamW's decay, on matrices only", **at_least(0))
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
    seed: int = setting("training", 42, "seed of weights, dropout and the order of blocks", **at_least(0))
    num_threads: int | None = setting(
        "training", None, "CPU threads of each process; else the cores, shared by its processes", **at_least(1)
    )

    tf32: bool = setting("training", False, "float32 products of a GPU in TF32: faster, with 10 bits of mantissa")
    tuning: bool = setting(
        "training", True, "allocator, huge pages and lean modules that make a run faster and change no number"
    )

    per_device_eval_batch_size: int = setting(
        "evaluation", 8, "validation blocks at once, on each process", **at_least(1)
    )
    eval_steps: int | None = setting(
        "evaluation", None, "optimizer steps between evaluations; else each epoch", **at_least(1)
    )
    eval_stride: int | None = setting(
        "evaluation",
        None,
        "evaluate with a sliding window that moves by this many tokens; else by block_size: no overlap",
        **at_least(1),
    )
    named_perplexities: bool = setting(
        "evaluation", False, "also word_perplexity and bits_per_byte, comparable between tokenizers"
    )
    sample_prompt: list[str] | None = setting(  # noqa: RUF009
        "evaluation", None, "with each evaluation, show how the model goes on from this text; several: several texts"
    )
    eval_only: bool = setting("evaluation", False, "evaluate the model and stop")

    dry_run: bool = setting(
        "output", False, "print what the run will take in memory and time, from a few steps, and leave nothing"
    )
    output_dir: str | None = setting("output", None, "folder for the model and the records of the run")
    overwrite_output_dir: bool = setting("output", False, "delete what an earlier run left in output_dir")
    logging_steps: int = setting("output", 500, "optimizer steps between lines of training loss", **at_least(1))
    report_to: list[str] | None = setting(  # noqa: RUF009
        "output",
        None,
        "trackers that get the lines of metrics.jsonl too",
        check=lambda names: names in (["all"], ["none"]) or set(names) <= set(TRACKERS),
        wanted=f"all, none (the default), or some of {', '.join(TRACKERS)}",
    )
    checkpointing_steps: str = setting(
        "checkpoints",
        "epoch",
        "optimizer steps between checkpoints",
        check=lambda value: value in ("epoch", "none") or (value.isdecimal() and int(value) > 0),
        wanted="a number, epoch or none",
    )
    checkpoints_total_limit: int | None = setting(
        "checkpoints", 2, "newest checkpoints to keep, beside the one with the best validation loss", **at_least(1)
    )
    resume_from_checkpoint: str | None = setting(
        "checkpoints", None, "auto: go on from output_dir's newest whole checkpoint, or start; or a checkpoint's folder"
    )
    resume_with_changes: bool = setting(
        "checkpoints", False, "go on although settings changed that change the result: more epochs, another rate"
    )
    ddp_timeout: int = setting(
        "checkpoints", 600, "seconds that a process waits for its peers before it gives up", **at_least(1)
    )
    traceback: bool = setting("output", False, "show Python's traceback with an error")

    push_to_hub: bool = setting(
        "publishing", False, "push the exported model to the hub; the token comes from HF_TOKEN or `hf auth login`"
    )
    hub_model_id: str | None = setting(
        "publishing", None, "repository to push to, owner/name or name; else the name of output_dir, under your own"
    )
    hub_private_repo: bool = setting("publishing", False, "make the repository private where it is a new one")
    hub_strategy: str = setting(
        "publishing",
        "end",
        "when to push: when all is done, or also, in the background, the model of each checkpoint",
        **one_of("end", "every_save"),
    )


def convert(value, kind):
    """`value` (text of the command line, or a YAML value) as `kind`, one of a field's types; ValueError if it is none.

    YAML reads 2e-5 as text, so a number may come as text from there too; a bool is never a number.
    """
    if value is None and kind != _kind(kind):
        return None
    kind = _kind(kind)
    if kind == list[str] and value != []:
        return [convert(entry, str) for entry in (value if isinstance(value, list) else [value])]
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind is str and isinstance(value, (str, int)) and not isinstance(value, bool) and str(value):
        return str(value)
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        number = float(value)
        if number == number and abs(number) != float("inf") and (kind is float or number == int(number)):
            return (
                int(value) if kind is int and isinstance(value, str) and value.lstrip("-").isdigit() else kind(number)
            )
    raise ValueError


def read_settings(argv):
    """The settings that the command line `argv` (a list of words) asks for.

    Raises ValueError with one line for each problem: unknown keys, wrong types, values out of range, settings that
    contradict each other, files that are not there. `--help` prints what settings there are, `--print_config` prints
    those that came out, as a recipe, and both leave with SystemExit.
    """
    problems = []
    recipe, flags = _split_command_line(argv, problems)
    print_config = flags.pop("print_config", False)
    if recipe is None and not {
        "model_name_or_path",
        "config_name",
        "model_type",
        "dataset_name",
        "train_file",
        "validation_file",
    } & set(flags):
        recipe = "quickstart"
    values = {}
    sources = [("the command line", "--", flags)]
    if recipe is not None:
        sources.insert(0, (f"recipe {recipe}", "", _read_recipe(recipe, problems)))
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    for source, dashes, entries in sources:
        for name, value in entries.items():
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {dashes}{close[0]}?" if close else ""
                problems.append(f"{source}: {dashes}{name} is not a setting{hint}")
                continue
            f = fields[name]
            try:
                values[name] = convert(value, f.type)
                if values[name] is not None and f.metadata["check"] and not f.metadata["check"](values[name]):
                    raise ValueError
            except (ValueError, OverflowError):
                wanted = ", ".join(filter(None, [_type_name(f.type), f.metadata["wanted"]]))
                problems.append(f"{source}: {dashes}{name} is {value!r}, but must be {wanted}")
    settings = Settings(**values)
    problems = problems or _contradictions(settings)
    if problems:
        raise ValueError("\n".join(problems))
    if print_config:
        if int(os.environ.get("RANK", 0)) == 0:
            print(as_recipe(settings), end="")
        sys.exit()
    return settings


def as_recipe(settings):
    """Every setting as YAML, which `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)


def _split_command_line(argv, problems):
    """(recipe or None, {flag: text}); what is neither a flag nor a flag's value goes to `problems`."""
    parser = argparse.ArgumentParser(
        prog="train_loop/main.py",
        usage="accelerate launch %(prog)s [--config RECIPE] [--NAME VALUE ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Fine-tune a causal language model. A flag wins over the recipe, the recipe over the default. "
        "Without --config, a model or data, the recipe is quickstart.",
    )
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    parser.add_argument("--config", metavar="RECIPE", nargs="?", help=f"a YAML file, or one of: {names}")
    parser.add_argument("--print_config", action="store_true", help="print the settings as a recipe, and stop")
    groups = {}
    for f in dataclasses.fields(Settings):
        group = f.metadata["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        default = "" if f.default is None else f" (default: {str(f.default).lower() if f.type is bool else f.default})"
        wanted = f"; {f.metadata['wanted']}" if f.metadata["wanted"] else ""
        several = _kind(f.type) == list[str]
        groups[group].add_argument(
            f"--{f.name}",
            nargs="*" if several else "?",
            action="extend" if several else "store",
            const="true" if f.type is bool else None,
            metavar="true|false" if f.type is bool else _type_name(f.type).split()[-1].upper(),
            help=(f.metadata["help"] + wanted + default).replace("%", "%%"),
        )
    # --block-size is --block_size, as in transformers' own parser
    words = [
        word.split("=")[0].replace("-", "_").replace("__", "--", 1) + word[len(word.split("=")[0]) :]
        if word.startswith("--")
        else word
        for word in argv
    ]
    known, unknown = parser.parse_known_args(words)
    flags = vars(known)
    for word in unknown:
        if word.startswith("--"):
            flags[word[2:].split("=")[0]] = ""
        elif not (unknown.index(word) and unknown[unknown.index(word) - 1].startswith("--")):
            problems.append(f"the command line: {word!r} belongs to no flag")
    if "config" in flags and flags["config"] is None:
        problems.append("the command line: --config needs the name of a recipe or a YAML file")
    for name, value in flags.items():
        if value in (None, []) and name != "config":
            flags[name] = ""  # a flag without its value: no type takes this
    return flags.pop("config", None), flags


def _read_recipe(recipe, problems):
    """The mapping in a recipe, by name or by path; {} and a problem if there is none."""
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError("it is not a list of 'name: value' lines")
        return {str(name): value for name, value in entries.items()}
    except FileNotFoundError:
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        problems.append(f"the command line: --config {recipe} is neither a file nor a recipe; recipes are {names}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"--config {recipe} cannot be read: {' '.join(str(error).split())}")
    return {}


def _contradictions(s):
    """One line for each set of settings that do not go together, and for each input file that is not usable."""
    found = []
    models = [n for n in ("model_name_or_path", "config_name", "model_type") if getattr(s, n)]
    if len(models) != 1:
        given = " and ".join(models) or "none"
        found.append(f"give exactly one of model_name_or_path, config_name, model_type: {given} given")
    if (s.model_name_or_path or "").endswith(".gguf"):
        found.append("model_name_or_path is a GGUF file: give its folder, and its name as gguf_file")
    elif s.gguf_file and not s.model_name_or_path:
        found.append("gguf_file goes with model_name_or_path, the folder or the hub's repository that holds it")
    elif s.gguf_file and (folder := Path(s.model_name_or_path)).is_dir() and not (folder / s.gguf_file).is_file():
        found.append(f"gguf_file {s.gguf_file}: no such file in {folder}")
    if s.config_overrides and s.model_name_or_path:
        found.append("config_overrides goes with config_name or model_type: a pretrained model's shape is fixed")
    if s.tokenizer_name and s.tokenizer_vocab_size:
        found.append("give tokenizer_name or tokenizer_vocab_size, not both")
    if s.model_name_or_path and s.tokenizer_vocab_size:
        found.append("tokenizer_vocab_size goes with config_name or model_type: a pretrained model has its tokenizer")
    if s.model_type and not (s.tokenizer_name or s.tokenizer_vocab_size):
        found.append("model_type needs tokenizer_name or tokenizer_vocab_size")
    if s.dataset_name and (s.train_file or s.validation_file):
        found.append("give dataset_name or files, not both")
    if s.dataset_config_name and not s.dataset_name:
        found.append("dataset_config_name goes with dataset_name")
    if s.eval_only and not s.model_name_or_path:
        found.append("eval_only needs model_name_or_path")
    if s.eval_only and not (s.dataset_name or s.train_file or s.validation_file):
        found.append("eval_only needs data: dataset_name, train_file or validation_file")
    if not s.eval_only and not (s.dataset_name or s.train_file):
        found.append("no training data: give dataset_name or train_file")
    if not s.eval_only and not s.output_dir:
        found.append("output_dir is needed: the folder for the trained model")
    if s.resume_from_checkpoint and (s.overwrite_output_dir or s.eval_only):
        other = "overwrite_output_dir" if s.overwrite_output_dir else "eval_only"
        found.append(f"give resume_from_checkpoint or {other}, not both")
    if s.dry_run and s.eval_only:
        found.append("give dry_run or eval_only, not both: a plan is of training")
    if s.eval_stride and s.eval_stride > s.block_size:
        found.append(f"eval_stride is {s.eval_stride}, more than block_size {s.block_size}: tokens would be left out")
    if s.streaming and not s.eval_only:
        if not s.max_train_steps:
            found.append("streaming needs max_train_steps: how many steps an epoch has is not known before its end")
        if s.tokenizer_vocab_size:
            found.append("streaming needs a tokenizer: tokenizer_vocab_size would read all training rows to train one")
        if s.train_file and not s.validation_file:
            found.append("streaming needs validation_file: the last rows cannot be held out before they are all read")
        if s.dataset_name == "python_docs":
            found.append("streaming goes with train_file or a data set of `datasets`, not with python_docs")
    if s.shuffle_buffer_size != Settings.shuffle_buffer_size and not s.streaming:
        found.append("shuffle_buffer_size goes with streaming: prepared blocks are shuffled over the whole epoch")
    if s.document_attention and not s.add_eos_token:
        found.append("document_attention goes with add_eos_token, which marks where documents end")
    if s.early_stopping_threshold and not s.early_stopping_patience:
        found.append("early_stopping_threshold goes with early_stopping_patience")
    if s.load_best_model_at_end and s.checkpointing_steps == "none":
        found.append("load_best_model_at_end keeps the best model as a checkpoint, but checkpointing_steps is none")
    for name in ("load_best_model_at_end", "early_stopping_patience", "sample_prompt", "report_to"):
        if s.eval_only and getattr(s, name) not in (None, False, ["none"]):
            found.append(f"{name} goes with training, not with eval_only")
    for name in ("hub_model_id", "hub_private_repo", "hub_strategy"):
        if getattr(s, name) != getattr(Settings, name) and not s.push_to_hub:
            found.append(f"{name} goes with push_to_hub")
    if s.push_to_hub and s.eval_only:
        found.append("give push_to_hub or eval_only, not both: evaluating exports nothing")
    if s.hub_strategy == "every_save" and s.checkpointing_steps == "none":
        found.append("hub_strategy every_save pushes checkpoints, but checkpointing_steps is none")
    for name in ("train_file", "validation_file"):
        if not getattr(s, name):
            continue
        paths = train_files(s) if name == "train_file" and s.streaming else [Path(getattr(s, name))]
        if len({file_kind(path) for path in paths}) > 1:
            found.append(f"{name} {getattr(s, name)}: files of more than one kind")
        is_whole = text_files(getattr(s, name))  # each file a row
        if is_whole is not None and not (is_whole or (s.streaming and len(paths) > 1)):
            found.append(f"{name} {getattr(s, name)}: there is no text file in it")
            continue
        for path in [] if is_whole else paths:
            if not path.is_file():
                found.append(f"{name} {path}: no such file")
            elif file_kind(path) is None:
                found.append(f"{name} {path}: its kind is not known; use {', '.join(FILE_KINDS)} (or these with .gz)")
            elif path.stat().st_size == 0:
                found.append(f"{name} {path} is empty")
            elif s.add_eos_token and file_kind(path) == "text":
                found.append(
                    f"add_eos_token: a row of {path} is a line, not a document; use a folder, jsonl or parquet"
                )
    return found


def train_files(settings):
    """The files to stream: train_file, or the text files that it means as a folder or pattern, or what else fits it."""
    path = Path(settings.train_file)
    if path.is_file():
        return [path]
    return text_files(path) or [Path(p) for p in sorted(glob.glob(str(path)))] or [path]


def file_kind(path):
    """The `datasets` loader for a file, by its ending, a last .gz not counted; None if there is none."""
    path = Path(path)
    return FILE_KINDS.get((path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower())


def text_files(path):
    """The text files that a folder, or a pattern such as texts/**/*.txt, means, sorted by path, hidden ones left out;
    None where `path` is neither."""
    if Path(path).is_file() or not (Path(path).is_dir() or "*" in str(path)):
        return None
    pattern = f"{glob.escape(str(path))}/**" if Path(path).is_dir() else str(path)
    found = map(Path, glob.glob(pattern, recursive=True))
    return sorted(file for file in found if file.is_file() and file_kind(file) == "text")


def _kind(kind):
    """The type of a setting, without the None that stands for off."""
    return next(k for k in (kind.__args__ if isinstance(kind, types.UnionType) else (kind,)) if k is not types.NoneType)


def _type_name(kind):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list[str]: "text"}
    return names[_kind(kind)]
