"""Several runs in one picture, what they did differently, and which has the lower loss:

python -m train_loop.compare runs/a runs/b --output comparison.png
python -m train_loop.compare runs/a-* runs/b-*
"""

import argparse
import os
import sys
import textwrap
from pathlib import Path

from train_loop.compare.differences import Measured, in_words, loss_table, measure
from train_loop.compare.picture import draw
from train_loop.compare.runs import read_run, recipes, short_names
from train_loop.compare.settings_table import COLUMNS, settings_table
from train_loop.errors import UserError, tell
from train_loop.process import printable, safe_console


@safe_console()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train_loop.compare", description=__doc__.split("\n")[0].rstrip(":")
    )
    parser.add_argument("runs", nargs="+", metavar="run", help="output_dir of a run, finished or not")
    parser.add_argument("--output", help="the picture, .png, .pdf or .svg; else comparison.png where the runs are")
    parser.add_argument("--best", action="store_true", help="of each run the evaluation with the lowest loss")
    parser.add_argument("--on", metavar="NAME", help="the validation set to compare on; else the first")
    arguments = parser.parse_args(argv)
    folders = list(dict.fromkeys(Path(run) for run in arguments.runs))
    try:
        runs = dict(zip(short_names(folders), map(read_run, folders), strict=True))
        groups = {name: [runs[member] for member in members] for name, members in recipes(runs).items()}
        measured, problem = None, None
        if len(runs) > 1:
            try:
                measured = measure(groups, arguments.best, arguments.on)
            except UserError as error:
                problem = str(error)
        output = arguments.output or Path(os.path.commonpath([f.absolute().parent for f in folders])) / "comparison.png"
        draw(groups, measured, output, arguments.on)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")
    print(settings_table(groups, arguments.on))
    if measured:
        print(f"\n{said(measured)}")
    if problem:
        tell(f"no interval: {problem}")
    print(f"\nlosses drawn to {os.path.relpath(output)}")


def said(measured: Measured) -> str:
    """What the losses say, in at most 80 columns."""
    lines, names = [loss_table(measured)], list(measured.losses)
    if len(names) == 2:
        wrap = textwrap.TextWrapper(COLUMNS, break_long_words=False, break_on_hyphens=False)
        lines += ["", *map(wrap.fill, in_words(measured, *names).splitlines())]
    return "\n".join(lines)
