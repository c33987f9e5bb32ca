"""Writes README.md beside this file: the usual settings' defaults, what arguments of transformers' scripts become, and
the loop's own settings."""

import dataclasses

from train_loop.settings.habits import ALIASES, NO_EFFECT, REFUSED, SAME
from train_loop.settings.settings import Settings

HEAD = """# Arguments and settings

The first table has the usual settings. The second says what becomes of the arguments of `TrainingArguments`,
`run_clm.py` and `run_clm_no_trainer.py`, in a recipe or on the command line. The third lists the settings that only
this loop has. Any other argument is refused as unknown, except the flags `--config`, `--print_config`,
`--print_launch_config` and `--help`. `--help` lists all settings with their defaults. This page is written from the
code, by this command in the repository's root:

    python -c 'from train_loop.settings.page import page; print(page(), end="")' > train_loop/settings/README.md

## The usual settings

A recipe may set other values: `accelerate launch train_loop/main.py --config NAME --print_config` shows them.
`output_dir` has no default: give one, unless the recipe does or the run is `--eval_only`.

| setting | default | |
|---|---|---|
"""
SCRIPTS = """
## Arguments of transformers' scripts

| argument | here | |
|---|---|---|
"""
OWN = """
## Settings of this loop alone

A default that is not given: the setting is off, or follows from the others.

| setting | default | |
|---|---|---|
"""
USUAL = [
    "block_size",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "num_warmup_steps",
    "weight_decay",
    "seed",
    "eval_steps",
    "logging_steps",
    "checkpointing_steps",
    "output_dir",
]


def page() -> str:
    """The text of README.md."""
    rows = [(name, "same", note) for name, note in SAME.items()]
    rows += [(name, f"alias of `{target}`", note) for name, (target, note) in ALIASES.items()]
    rows += [(name, "no effect", why) for name, why in NO_EFFECT.items()]
    for name, (instead, taken) in REFUSED.items():
        rows.append((name, f"refused, except {taken.replace(',', ', ')}" if taken else "refused", instead))
    fields = {
        f.name: (f.name, "" if f.default is None else str(f.default).lower(), f.metadata["help"])
        for f in dataclasses.fields(Settings)
    }
    usual, own = [fields[name] for name in USUAL], [fields[name] for name in fields if name not in SAME]
    return HEAD + _table(usual) + SCRIPTS + _table(sorted(rows)) + OWN + _table(own)


def _table(rows: list[tuple[str, str, str]]) -> str:
    return "".join(f"| `{name}` | {kind} | {note} |\n" for name, kind, note in rows)
