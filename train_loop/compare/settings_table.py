"""What the runs did differently: a table of settings, and of the best evaluation of each."""

from typing import Any

from train_loop.compare.runs import SAY_NOTHING, Run
from train_loop.report import points

COLUMNS = 80  # of the table


def settings_table(runs: dict[str, Run]) -> str:
    """The settings that differ and the best evaluation of each run, by its name, as text that is at most 80 columns
    wide: as many runs beside each other as fit."""
    names = dict.fromkeys(name for run in runs.values() for name in run.settings if name not in SAY_NOTHING)
    # a setting that a run does not know is newer than the run
    values = {name: [_text(run.settings.get(name)) for run in runs.values()] for name in names}
    rows = {name: cells for name, cells in values.items() if len(set(cells)) > 1}
    rows |= {"steps": [], "lowest validation loss": [], "its perplexity": [], "at step": []}
    for run in runs.values():
        lines = run.lines
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
