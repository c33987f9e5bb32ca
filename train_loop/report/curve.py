"""metrics.jsonl, and a picture of it: loss_curve.png.

Lines are those of metrics.jsonl; losses are nats per token. matplotlib is imported when something is drawn: it takes a
good part of a second.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train_loop.errors import UserError, warn

Line = dict[str, Any]  # of metrics.jsonl: "step", "epoch", and what was measured there, by name

MIN_POINTS_TO_SMOOTH = 20
OTHER_COLOURS = ("tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
WIDTH = 0.015  # of the smoothing, as a share of the run: one standard deviation


def read_lines(path: Path | str) -> list[Line]:
    """The lines of a metrics.jsonl. A last one that is still being written is left out, and so is a damaged one, with a
    warning. Raises UserError if no line can be read."""
    try:
        texts = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from error
    lines = []
    for number, text in enumerate(texts, 1):
        if number == len(texts) and not text.endswith("\n"):
            break
        try:
            line = json.loads(text)
            line["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            warn(f"{path} is damaged: line {number} is not a line of metrics and is left out")
            continue
        lines.append(line)
    if not lines:
        raise UserError(f"{path} has no line of metrics: nothing was logged yet, or the file is damaged")
    return lines


def points(lines: list[Line], name: str) -> np.ndarray:
    """(steps, values) of `name`, as arrays, where it is there and finite."""
    found = [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
    return np.array(found, dtype=float).reshape(-1, 2).T


def smooth(values: np.ndarray) -> np.ndarray:
    """A mean of each value and its neighbours, with Gaussian weights; unlike a running mean it does not lag."""
    sigma = max(1.0, WIDTH * len(values))
    reach = min(int(3 * sigma), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def of_each_set(evaluation: Line, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """{name of a validation set: (loss, perplexity)} of an evaluation, nan where it is not there. The numbers of the
    first set have no name."""
    keys = {name: f"eval_{name}_" if i else "" for i, name in enumerate(names)}
    return {
        name: (evaluation.get(f"{key or 'eval_'}loss", math.nan), evaluation.get(f"{key}perplexity", math.nan))
        for name, key in keys.items()
    }


def draw_run(lines: list[Line], path: Path | str, eval_names: Sequence[str] = ("validation",)) -> None:
    """Training loss, its smoothing, the loss of each validation set and the learning rate against the optimizer step,
    as a PNG."""
    plt = pyplot()
    figure, (axes, below) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 4.8), height_ratios=(4, 1), layout="constrained"
    )
    steps, losses = points(lines, "loss")
    smoothed = len(losses) >= MIN_POINTS_TO_SMOOTH
    axes.plot(steps, losses, color="tab:blue", lw=1, alpha=0.35 if smoothed else 1, label="training")
    if smoothed:
        axes.plot(steps, smooth(losses), color="tab:blue", lw=1.8, label="training, smoothed")
    first, *others = eval_names
    steps, losses = points(lines, "eval_loss")
    label = f"validation: {first}" if others else "validation"
    axes.plot(steps, losses, color="tab:orange", lw=1.8, marker="o", ms=4, label=label, zorder=3)
    for i, name in enumerate(others):
        colour = OTHER_COLOURS[i % len(OTHER_COLOURS)]
        of_set = points(lines, f"eval_{name}_loss")
        axes.plot(*of_set, color=colour, lw=1.4, marker="o", ms=3, label=f"validation: {name}")
    if len(losses):
        best = losses.argmin()
        lowest = f"{losses[best]:.3f} at step {steps[best]:,.0f} (perplexity {_ppl(losses[best])})"
        label = f"lowest validation loss{f' of {first}' if others else ''}: {lowest}"
        axes.plot(steps[best], losses[best], "o", ms=9, mfc="none", mec="black", mew=1.2, ls="none", label=label)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    steps, rates = points(lines, "learning_rate")
    below.plot(steps, rates, color="tab:gray", lw=1.5)
    below.set_ylabel("learning rate")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    below.set_ylim(bottom=0)
    below.set_xlabel("optimizer step")
    save_figure(figure, path)


def _ppl(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):,.1f}" if loss < 14 else f"{math.exp(min(loss, 700)):.1e}"


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path | str, without_steps: Sequence[Any] = ()) -> None:
    """Writes a picture of values against the optimizer step, and forgets it. `without_steps`: axes whose x is another
    value."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes in without_steps:
            continue
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    figure.align_ylabels()
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
