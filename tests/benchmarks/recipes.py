"""Recipes beside the reference recipe, on models that stand in for theirs: losses with intervals, and tokens.

    python tests/benchmarks/recipes.py train --folder runs/small --recipe distilgpt2_wikitext2 --seeds 1 2 3 \
        --model_name_or_path MODEL --train_file train.txt --validation_file valid.txt
    python tests/benchmarks/recipes.py train --folder runs/small --recipe distilgpt2_wikitext2_fast --seeds 1 2 3 ...
    python tests/benchmarks/recipes.py table --folder runs/small
    python tests/benchmarks/recipes.py average --folder runs/small --recipe distilgpt2_wikitext2_fast --seeds 1 2 3

`train` runs a recipe as it is written, but for model and data, once for each seed, in the folder NAME-SEED (--name;
else the recipe's name). Unknown arguments are passed to the run. A finished run is not touched; an unfinished
one is resumed. `table` prints the runs of the folders; the reference is what is called distilgpt2_wikitext2. `average`
evaluates the means of the weights of a run's last 1, 2, 4 and 8 checkpoints (train with --checkpointing_steps N
--checkpoints_total_limit 8), and compares them with the run's own last evaluation. The first of them is that model:
where its difference is not 0, the evaluation is not the same, as with another mixed precision.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from train_loop.checkpoint.durable import name_of, steps_in
from train_loop.compare import difference
from train_loop.report import BLOCK_NATS, BlockNats, read_block_nats, read_lines

ROOT = Path(__file__).parent.parent.parent
REFERENCE = "distilgpt2_wikitext2"
REPLACED = ("model_name_or_path", "dataset_name", "dataset_config_name", "output_dir")
OF_THE_RUN = ("model_name_or_path", "gguf_file", "output_dir", "resume_from_checkpoint", "resume_with_changes")
COLUMNS = (
    "stand-in, recipe, seeds, tokens, before, after, minus the reference's, share of its tokens, share to its loss"
)


def train(folder: Path, recipe: str, name: str, seeds: list[int], more: list[str]) -> None:
    settings = yaml.safe_load((ROOT / "train_loop" / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key not in REPLACED}))
    for seed in seeds:
        output = folder / f"{name}-{seed}"
        if not (output / "all_results.json").exists():
            command = [f"--config={config}", f"--seed={seed}", f"--output_dir={output}"]
            train_loop([*command, "--resume_from_checkpoint=auto", *more])


def table(folders: list[Path]) -> None:
    """A row for each recipe. Losses are means over its seeds; the last column is of the evaluations while it trained:
    the first at or below the reference's last loss, of the seed that took longest."""
    print(f"| {COLUMNS.replace(', ', ' | ')} |\n" + "|---" * len(COLUMNS.split(",")) + "|")
    for folder in folders:
        found: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("*-*/all_results.json")):
            found.setdefault(path.parent.name.rpartition("-")[0], []).append(path.parent)
        if REFERENCE not in found:
            sys.exit(f"{folder} has no finished run of {REFERENCE}")
        if len({last_nats(run).blocks for runs in found.values() for run in runs}) > 1:
            sys.exit(f"the runs in {folder} were evaluated on different blocks")
        nats = {name: np.stack([last_nats(run).nats for run in runs]) for name, runs in found.items()}
        targets = last_nats(found[REFERENCE][0]).targets
        losses = {name: of_runs.sum(1).mean() / targets.sum() for name, of_runs in nats.items()}
        for name, runs in found.items():
            evaluations = [
                [line for line in read_lines(run / "metrics.jsonl") if line.get("eval_loss") is not None]
                for run in runs
            ]
            share = num_tokens(runs[0]) / num_tokens(found[REFERENCE][0])
            reached = []
            for lines in evaluations:
                steps = [line["step"] for line in lines if line["eval_loss"] <= losses[REFERENCE]]
                reached.append(share * steps[0] / lines[-1]["step"] if steps else float("inf"))
            against = difference(nats[REFERENCE], nats[name], targets)
            minus = f"{against.value:+.4f} +- {against.half_width:.4f}"
            shares = [f"{share:.2f}", f"{max(reached):.2f}"]
            before = [f"{line['eval_loss']:.4f}" for lines in evaluations for line in lines if line["step"] == 0]
            row = [folder.name, name, len(runs), f"{num_tokens(runs[0]):,}", (before or [""])[0]]
            row += [f"{losses[name]:.4f}", *(["", "1", ""] if name == REFERENCE else [minus, *shares])]
            print(f"| {' | '.join(map(str, row))} |")


def average(run: Path) -> None:
    steps = steps_in(run / "checkpoints")
    if len(steps) < 2:
        sys.exit(
            f"{run} has fewer than two checkpoints: train with --checkpointing_steps and --checkpoints_total_limit"
        )
    settings = yaml.safe_load((run / "train_config.yaml").read_text(encoding="utf-8"))
    trained = last_nats(run)
    for last in (number for number in (1, 2, 4, 8) if number <= len(steps)):
        weights = [load_file(run / "checkpoints" / name_of(step) / "model.safetensors") for step in steps[-last:]]
        with tempfile.TemporaryDirectory() as folder:
            model, config, output = (Path(folder, name) for name in ("model", "config.yaml", "output"))
            shutil.copytree(run, model, ignore=shutil.ignore_patterns("checkpoints", "evaluations", "model*"))
            means = {key: torch.stack([one[key] for one in weights]).mean(0) for key in weights[0]}
            save_file(means, model / "model.safetensors", {"format": "pt"})
            config.write_text(yaml.safe_dump({key: settings[key] for key in settings if key not in OF_THE_RUN}))
            command = [f"--config={config}", "--eval_only", f"--model_name_or_path={model}", f"--output_dir={output}"]
            train_loop(command, stdout=subprocess.DEVNULL)
            found = last_nats(output)
        if found.blocks != trained.blocks:
            sys.exit(f"{run} was evaluated on different blocks")
        against = difference(trained.nats[None], found.nats[None], found.targets)
        loss, minus = found.nats.sum() / found.targets.sum(), f"{against.value:+.4f} +- {against.half_width:.4f}"
        print(f"{run.name}, mean of steps {steps[-last:]}: {loss:.4f}, minus that of the run: {minus}")


def train_loop(arguments: list[str], **options: Any) -> None:
    command = [sys.executable, "-m", "train_loop.main", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)


def last_nats(run: Path) -> BlockNats:
    return next(iter(read_block_nats(run / BLOCK_NATS)["last"].sets.values()))


def num_tokens(run: Path) -> int:
    return json.loads((run / "all_results.json").read_text(encoding="utf-8"))["train_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "table", "average"])
    parser.add_argument("--folder", type=Path, nargs="+", required=True)
    parser.add_argument("--recipe", default=REFERENCE)
    parser.add_argument("--name", help="what the runs are called; else as the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    options, more = parser.parse_known_args()
    name = options.name or options.recipe
    if options.what == "train":
        return train(options.folder[0], options.recipe, name, options.seeds, more)
    if more:
        parser.error(f"unknown arguments: {' '.join(more)}")
    if options.what == "table":
        return table(options.folder)
    for folder, seed in itertools.product(options.folder, options.seeds):
        average(folder / f"{name}-{seed}")


if __name__ == "__main__":
    main()
