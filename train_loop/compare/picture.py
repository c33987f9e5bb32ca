"""A picture of several runs: their losses, and how sure the differences between them are."""

from pathlib import Path

import numpy as np

from train_loop.compare.differences import Measured
from train_loop.compare.runs import Run
from train_loop.report import MIN_POINTS_TO_SMOOTH, points, pyplot, save_figure, smooth


def draw(
    recipes: dict[str, list[Run]], measured: Measured | None, path: Path | str, set_name: str | None = None
) -> None:
    """Left: training losses (smoothed). Right: losses on validation set `set_name` (else the first), the mean over a
    recipe's runs, with a band from the lowest run to the highest. The untrained model's loss is left out: beside it
    the others would look alike. Below, with `measured`: each recipe's distance to the lowest loss, with its 95 %
    interval."""
    plt = pyplot()
    height, height_below = 3.8 + 0.2 * len(recipes), 0.8 + 0.3 * len(recipes)  # inches
    figure = plt.figure(figsize=(9, height + height_below * bool(measured)), layout="constrained")
    # figures of their own: long names beside the lower one leave the width of the upper one as it is
    above, *rest = np.atleast_1d(figure.subfigures(2, 1, height_ratios=(height, height_below)) if measured else figure)
    left, right = above.subplots(1, 2, sharex=True)
    styles = {
        name: {"color": plt.get_cmap("tab10")(i % 10), "ls": ("-", "--", ":")[i // 10 % 3]}
        for i, name in enumerate(recipes)
    }
    for name, runs in recipes.items():
        style = styles[name]
        for run in runs:
            steps, losses = points(run.lines, "loss")
            if len(losses) >= MIN_POINTS_TO_SMOOTH:
                left.plot(steps, losses, lw=0.8, alpha=0.2, **style)
                losses = smooth(losses)
            left.plot(steps, losses, lw=1.6, **style)
        steps, mean, low, high = validation(runs, set_name)
        several = f"mean of {len(runs)} runs, " if len(runs) > 1 else ""
        lowest = f" ({several}lowest: {mean.min():.3f})" if len(mean) else ""
        right.plot(steps, mean, lw=1.6, marker="o", ms=4, label=f"{name}{lowest}", **style)
        if len(runs) > 1:
            right.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)
    for axes, kind in ((left, "training loss"), (right, f"loss on {set_name}" if set_name else "validation loss")):
        axes.set_ylabel(f"{kind} (nats per token)")
        axes.set_xlabel("optimizer step")
    right.legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1))  # not upon the curves
    below = rest[0].subplots() if rest else None
    if measured and below:
        names = sorted(measured.losses, key=measured.loss, reverse=True)  # the lowest loss is on top
        for place, name in enumerate(names):
            found = measured.difference(names[-1], name)
            half_width = found.half_width if name != names[-1] else 0
            below.errorbar(found.value, place, xerr=half_width, fmt="o", ms=5, capsize=4, **styles[name])
        below.axvline(0, color="black", lw=0.8)
        below.set_yticks(range(len(names)), names)
        below.set_ylim(-0.6, len(names) - 0.4)
        below.set_xlabel(f"{measured.unit} above {names[-1]}, with 95 % intervals")
    save_figure(figure, path, without_steps=[below] if below else [])


def validation(runs: list[Run], set_name: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean, lowest, highest) of the validation losses of runs, at the steps that all of them have."""
    found = [dict(zip(*points(run.lines, run.metric("loss", set_name)), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(losses) for losses in found)) - {0})
    losses = np.array([[of_run[step] for step in steps] for of_run in found]).reshape(len(runs), -1)
    return np.array(steps), losses.mean(0), losses.min(0), losses.max(0)
