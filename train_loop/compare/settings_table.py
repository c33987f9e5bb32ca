"""A table of the settings that differ between the runs, and of each run's lowest loss."""

from collections.abc import Iterable
from statistics import geometric_mean, mean
from typing import Any

from train_loop.compare.runs import SAY_NOTHING, Run
from train_loop.report import points

COLUMNS = 80  # of the table


def settings_table(recipes: dict[str, list[Run]], set_name: str | None = None) -> str:
    """The settings that differ between the recipes, and the lowest loss of each on validation set `set_name`, else the
    first, as text of at most 80 columns, with as many recipes side by side as fit. A cell has the values of all runs
    of the recipe; losses are their mean."""
    runs = [run for of_recipe in recipes.values() for run in of_recipe]
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in SAY_NOTHING)
    # a setting that a run does not know is newer than the run
    values = {
        name: [_all(_text(run.settings.get(name)) for run in several) for several in recipes.values()] for name in names
    }
    rows = {name: cells for name, cells in values.items() if len(set(cells)) > 1}
    lowest_loss = "lowest validation loss" if set_name is None else f"lowest loss on {set_name}"
    rows |= {"steps": [], lowest_loss: [], "its perplexity": [], "at step": []}
    for several in recipes.values():
        lowest = [found for run in several if (found := _lowest(run, set_name))]
        rows["steps"].append(_all(f"{run.lines[-1]['step']:,}" for run in several))
        losses, perplexities, steps = zip(*lowest, strict=True) if lowest else ((), (), ())
        rows[lowest_loss].append(f"{mean(losses):.4f}" if losses else "-")
        rows["its perplexity"].append(f"{geometric_mean(perplexities):,.2f}" if losses else "-")
        rows["at step"].append(_all(f"{step:,.0f}" for step in steps) or "-")

    first = max(map(len, rows))
    widest = max(len(cell) for cells in [list(recipes), *rows.values()] for cell in cells)
    width = min(widest, max(12, (COLUMNS - first) // min(len(recipes), 2) - 2))
    num_beside = max(1, (COLUMNS - first) // (width + 2))
    blocks = []
    for begin in range(0, len(recipes), num_beside):
        beside = slice(begin, begin + num_beside)
        cut = [("", list(recipes)[beside]), *((name, cells[beside]) for name, cells in rows.items())]
        blocks.append("\n".join(_row(name, cells, first, width) for name, cells in cut))
    return "\n\n".join(blocks)


def _lowest(run: Run, set_name: str | None) -> tuple[float, float, float] | None:
    """(loss, perplexity, step) of the run's evaluation with the lowest loss; None if it has none."""
    steps, losses = points(run.lines, run.metric("loss", set_name))
    if not len(losses):
        return None
    name = run.metric("perplexity", set_name)
    perplexities = {line["step"]: line[name] for line in run.lines if name in line}
    step = steps[losses.argmin()]
    return losses.min(), perplexities[step], step


def _all(cells: Iterable[str]) -> str:
    """The distinct cells, in order."""
    return ", ".join(dict.fromkeys(cells))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _row(name: str, cells: list[str], first: int, width: int) -> str:
    # the end of a long cell tells more: a path's name, a run's number
    cells = [cell if len(cell) <= width else "..." + cell[3 - width :] for cell in cells]
    return f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell in cells)
