"""The runs that are compared, and which of them are one recipe with different seeds."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train_loop.errors import UserError
from train_loop.report import BLOCK_NATS, BlockNats, Kept, Line, read_block_nats, read_lines
from train_loop.whole import read_object

SAY_NOTHING = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "resume_with_changes", "traceback")
NOT_THE_RECIPE = {*SAY_NOTHING, "seed", "run_name", "report_to", "mirror", "save_minutes", "max_minutes"}


@dataclass(frozen=True)
class Run:
    """The folder of a run, finished or not, or of an evaluation (`eval_only`)."""

    folder: Path
    settings: dict[str, Any]
    lines: list[Line]  # of metrics.jsonl; an evaluation has one, at step 0
    kept: dict[str, Kept]

    def evaluation(self, best: bool) -> Kept:
        """The evaluation to compare: of the exported model, or with `best` the one with the lowest loss. Raises
        UserError if its nats are missing."""
        when = "best" if best or self.settings.get("load_best_model_at_end") else "last"
        if self.settings.get("eval_only"):
            when = "last"
        if when not in self.kept:
            raise UserError(
                f"{self.folder} does not have the nats of its {when} evaluation: it was not made yet, or by an older "
                f"version. To have them, evaluate the model: --model_name_or_path {self.folder} --eval_only "
                "--output_dir runs/NAME"
            )
        return self.kept[when]

    def block_nats(self, best: bool, name: str | None) -> BlockNats:
        """Nats of validation set `name`, else the first. Raises UserError if there is none."""
        sets = self.evaluation(best).sets
        if name is not None and name not in sets:
            raise UserError(f"{self.folder} has no validation set {name}; it has {', '.join(sets)}")
        return sets[name] if name is not None else next(iter(sets.values()))

    def metric(self, metric: str, name: str | None) -> str:
        """The key in `lines` of the `loss` or `perplexity` of validation set `name`, else the first."""
        if name is not None and name not in {next(iter(kept.sets)) for kept in self.kept.values()}:
            return f"eval_{name}_{metric}"
        return "eval_loss" if metric == "loss" else metric


def read_run(folder: Path) -> Run:
    """The run in a folder. Raises UserError if it is none."""
    path = folder / "train_config.yaml"
    try:
        settings = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        if (folder / "metrics.jsonl").is_file():
            raise UserError(f"{path} cannot be read: there is no such file") from error
        raise UserError(f"{folder} is not the folder of a run: there is no train_config.yaml in it") from error
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if settings.get("eval_only") and not (folder / "metrics.jsonl").exists():
        lines = [{"step": 0, **_results(folder)}]
    else:
        lines = read_lines(folder / "metrics.jsonl")
    return Run(folder, settings, lines, read_block_nats(folder / BLOCK_NATS))


def _results(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "all_results.json")
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no result: the evaluation is not over, or was cut short") from error


def short_names(folders: list[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    length = 1
    while len({name[-length:] for name in parts}) < len(parts) and length < max(map(len, parts)):
        length += 1
    return [os.path.join(*name[-length:]) for name in parts]


def recipes(runs: dict[str, Run]) -> dict[str, list[str]]:
    """{name of a recipe: names of its runs}, in the order of the runs. `runs` by their names.

    Runs are one recipe if their settings differ only in the seed, and their names only in the seed's number: a-1 and
    a-2 are a-*. The name counts because no setting shows a change in the code. A recipe with one run has its name.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, run in runs.items():
        seed = run.settings.get("seed")
        before, number, after = name.rpartition(str(seed))
        is_whole = number and not re.search(r"\d$", before) and not re.match(r"\d", after)
        pattern = f"{before}*{after}" if is_whole else name
        rest = {key: value for key, value in run.settings.items() if key not in NOT_THE_RECIPE}
        groups.setdefault((pattern, json.dumps(rest, sort_keys=True, default=str)), []).append(name)
    patterns = [pattern for (pattern, _), members in groups.items() if len(members) > 1]
    return {_label(pattern, members, patterns): members for (pattern, _), members in groups.items()}


def _label(pattern: str, members: list[str], patterns: Iterable[str]) -> str:
    if len(members) == 1:
        return members[0]
    return pattern if list(patterns).count(pattern) == 1 else ", ".join(members)
