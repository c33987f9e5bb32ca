"""What the loop uses besides model, optimizer and data. Nothing here changes a weight."""

from dataclasses import dataclass

from accelerate import Accelerator

from train_loop.checkpoint import Checkpoints
from train_loop.process import StopSignal
from train_loop.publish import Publisher
from train_loop.report import Metrics, Samples


@dataclass(frozen=True)
class Services:
    """Every process has the same ones, and calls their methods at the same places."""

    accelerator: Accelerator
    metrics: Metrics  # lines and tables of numbers
    checkpoints: Checkpoints
    stop: StopSignal  # whether the run was asked to stop
    publisher: Publisher | None = None  # may push each checkpoint
    samples: Samples | None = None  # text that the model writes with each evaluation
