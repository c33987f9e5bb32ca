"""Several runs in one picture, and a table of what they did differently:

python -m train_loop.compare runs/a runs/b --output comparison.png
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from train_loop.errors import UserError
from train_loop.process import printable, safe_console
from train_loop.report import Line, draw_runs, points, read_lines

SAY_NOTHING = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "resume_with_changes", "traceback")
Run = tuple[dict[str, Any], list[Line]]  # its settings, and its lines of metrics.jsonl
COLUMNS = 80  # of the table


@safe_console()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].rstrip(":"))
    parser.add_argument("runs", nargs="+", metavar="run", help="output_dir of a run, finished or not")
    parser.add_argument("--output", help="the picture, .png, .pdf or .svg; else comparison.png where the runs are")
    arguments = parser.parse_args(argv)
    folders = list(dict.fromkeys(Path(run) for run in arguments.runs))
    try:
        runs = dict(zip(short_names(folders), map(read_run, folders), strict=True))
        output = arguments.output or Path(os.path.commonpath([f.absolute().parent for f in folders])) / "comparison.png"
        draw_runs({name: lines for name, (_, lines) in runs.items()}, output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")
    print(table(runs))
    print(f"\nlosses drawn to {os.path.relpath(output)}")


def read_run(folder: Path) -> Run:
    """(settings, lines) of the run in a folder. Raises UserError where it is none."""
    lines = read_lines(folder / "metrics.jsonl")
    try:
        settings = yaml.safe_load((folder / "train_config.yaml").read_text(encoding="utf-8"))
        return dict(settings), lines
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'train_config.yaml'} cannot be read: {' '.join(str(error).split())}") from error


def short_names(folders: list[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    length = 1
    while len({name[-length:] for name in parts}) < len(parts) and length < max(map(len, parts)):
        length += 1
    return [os.path.join(*name[-length:]) for name in parts]


def table(runs: dict[str, Run]) -> str:
    """The settings that differ and the best evaluation of each run, {name: (settings, lines)}, as text that is at most
    80 columns wide: as many runs beside each other as fit."""
    names = dict.fromkeys(name for settings, _ in runs.values() for name in settings if name not in SAY_NOTHING)
    # a setting that a run does not know is newer than the run
    values = {name: [_text(settings.get(name)) for settings, _ in runs.values()] for name in names}
    rows = {name: cells for name, cells in values.items() if len(set(cells)) > 1}
    rows |= {"steps": [], "lowest validation loss": [], "its perplexity": [], "at step": []}
    for _, lines in runs.values():
        steps, losses = points(lines, "eval_loss")
        best = losses.argmin() if len(losses) else None
        perplexities = {line["step"]: line["perplexity"] for line in lines if "perplexity" in line}
        rows["steps"].append(f"{lines[-1]['step']:,}")
        rows["lowest validation loss"].append("-" if best is None else f"{losses[best]:.4f}")
        rows["its perplexity"].append("-" if best is None else f"{perplexities[steps[best]]:,.2f}")
        rows["at step"].append("-" if best is None else f"{steps[best]:,.0f}")

    first = max(map(len, rows))
    widest = max(len(cell) for cells in [list(runs), *rows.values()] for cell in cells)
    width = min(widest, max(12, (COLUMNS - first) // min(len(runs), 2) - 2))
    num_beside = max(1, (COLUMNS - first) // (width + 2))
    blocks = []
    for begin in range(0, len(runs), num_beside):
        beside = slice(begin, begin + num_beside)
        cut = [("", list(runs)[beside]), *((name, cells[beside]) for name, cells in rows.items())]
        blocks.append("\n".join(_row(name, cells, first, width) for name, cells in cut))
    return "\n\n".join(blocks)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _row(name: str, cells: list[str], first: int, width: int) -> str:
    # of a long cell the end tells more: a path's name, a run's number
    cells = [cell if len(cell) <= width else "..." + cell[3 - width :] for cell in cells]
    return f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell in cells)


if __name__ == "__main__":
    main()
