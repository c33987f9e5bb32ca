"""Writes README.md beside this file: what arguments of transformers' scripts become, and the loop's own settings."""

import dataclasses

from train_loop.settings.habits import ALIASES, NO_EFFECT, REFUSED, SAME
from train_loop.settings.settings import Settings

HEAD = """# Arguments and settings

The first table says what becomes of the arguments of `TrainingArguments`, `run_clm.py` and `run_clm_no_trainer.py`, in
a recipe or on the command line. The second lists the settings that only this loop has. An argument in neither table is
refused as unknown, except the flags `--config`, `--print_config`, `--print_launch_config` and `--help`. `--help` has
the settings of both tables with their defaults. This page is written from the code:

    python -c 'from train_loop.settings.page import page; print(page(), end="")'

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


def page() -> str:
    """The text of README.md."""
    rows = [(name, "same", note) for name, note in SAME.items()]
    rows += [(name, f"alias of `{target}`", note) for name, (target, note) in ALIASES.items()]
    rows += [(name, "no effect", why) for name, why in NO_EFFECT.items()]
    for name, (instead, taken) in REFUSED.items():
        rows.append((name, f"refused, except {taken.replace(',', ', ')}" if taken else "refused", instead))
    fields = [field for field in dataclasses.fields(Settings) if field.name not in SAME]
    own = [(f.name, "" if f.default is None else str(f.default).lower(), f.metadata["help"]) for f in fields]
    return HEAD + _table(sorted(rows)) + OWN + _table(own)


def _table(rows: list[tuple[str, str, str]]) -> str:
    return "".join(f"| `{name}` | {kind} | {note} |\n" for name, kind, note in rows)
