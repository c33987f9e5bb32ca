"""What a person sees of a run, and what is kept of it.

    metrics.py   progress bar, table on the console, metrics.jsonl    summary.py  the arithmetic of a run, before it
    curve.py     pictures of metrics.jsonl                            sample.py   what the model writes while it trains
    trackers.py  TensorBoard, MLflow, Weights & Biases and others

Nothing here imports torch, so that `compare` answers at once.
"""

from train_loop.report.curve import Line, draw_runs, of_each_set, points, read_lines
from train_loop.report.metrics import Metrics, table
from train_loop.report.sample import Samples
from train_loop.report.summary import banner
from train_loop.report.trackers import Trackers, wanted_trackers

__all__ = [
    "Line",
    "Metrics",
    "Samples",
    "Trackers",
    "banner",
    "draw_runs",
    "of_each_set",
    "points",
    "read_lines",
    "table",
    "wanted_trackers",
]
