"""What the machine is asked for before torch is imported: memory that stays, huge pages, threads.

Measured to pay (tests/benchmarks). `--tuning false` leaves memory as the libraries have it.
"""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

from train_loop.settings import Settings

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as malloc.h of the GNU C library numbers them


def keep_memory() -> None:
    """Asks the GNU C library to keep freed memory, and torch to ask for huge pages. To be called before torch is
    imported; elsewhere than on Linux with that library it does nothing.

    A training step frees and asks for buffers of hundreds of megabytes. Each would be given back to the system and
    come again as pages of 4 KiB to be cleared one by one.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within it no garbage is looked for, and what was made in it is never looked at again: importing torch and
    transformers makes a million objects that stay, and a search through them each time that there are a tenth more."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def num_threads(settings: Settings) -> int:
    """CPU threads for this process: its share of the cores, unless the settings say otherwise. The launcher sets
    OMP_NUM_THREADS=1 where its config says nothing: one core would work, the others look on."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return settings.num_threads or max(1, num_cores() // processes_here)


def num_cores() -> int:
    """CPU cores that this process may use (a container or a scheduler may allow it fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
