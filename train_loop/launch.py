"""The processes, devices and threads of a run."""

import os
import sys

import datasets
import torch
import transformers
from accelerate import Accelerator


def build_accelerator(settings):
    """Accelerate's `Accelerator` as the launch config asks for it, without gradient accumulation of its own.

    Raises ValueError where the launcher started several processes that would each train alone.
    """
    has_device = torch.accelerator.is_available()
    # without cpu=True, CPU processes do not find each other: each would be a world of its own
    accelerator = Accelerator(cpu=not has_device or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {launched} processes, but Accelerate formed {accelerator.num_processes}"
        )
    if accelerator.device.type == "cpu":
        # the launcher sets OMP_NUM_THREADS=1 where its config says nothing: one core would work, the others look on
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(settings.num_threads or max(1, num_cores() // processes_here))
    return accelerator


def quiet_libraries(accelerator):
    """Progress bars of the libraries only on a terminal, and only from the main process. Returns whether they show."""
    show_progress = accelerator.is_main_process and sys.stderr.isatty()
    if not show_progress:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if not accelerator.is_main_process:
        transformers.utils.logging.set_verbosity_error()
    return show_progress


def num_cores():
    """CPU cores that this process may use (a container or a scheduler may allow it fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
