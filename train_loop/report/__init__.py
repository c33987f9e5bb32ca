"""What a run shows and records.

    metrics.py   progress bar, table on the console, metrics.jsonl    summary.py  the arithmetic of a run, before it
    curve.py     loss_curve.png, from metrics.jsonl                   sample.py   what the model writes while it trains
    trackers.py  TensorBoard, MLflow, Weights & Biases and others    evaluations.py  the nats of each validation block

Nothing here imports torch, so that `compare` answers at once.
"""

from train_loop.report.curve import (
    MIN_POINTS_TO_SMOOTH,
    Line,
    of_each_set,
    points,
    pyplot,
    read_lines,
    save_figure,
    smooth,
)
from train_loop.report.evaluations import (
    BLOCK_NATS,
    BlockNats,
    Evaluation,
    Kept,
    block_nats_as_bytes,
    read_block_nats,
    write_block_nats,
)
from train_loop.report.metrics import Metrics, table
from train_loop.report.sample import Samples, text_after
from train_loop.report.summary import banner
from train_loop.report.trackers import Trackers, wanted_trackers

__all__ = [
    "BLOCK_NATS",
    "MIN_POINTS_TO_SMOOTH",
    "BlockNats",
    "Evaluation",
    "Kept",
    "Line",
    "Metrics",
    "Samples",
    "Trackers",
    "banner",
    "block_nats_as_bytes",
    "of_each_set",
    "points",
    "pyplot",
    "read_block_nats",
    "read_lines",
    "save_figure",
    "smooth",
    "table",
    "text_after",
    "wanted_trackers",
    "write_block_nats",
]
