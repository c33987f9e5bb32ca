"""Memory and threads of a process: it keeps freed memory, uses huge pages, and its idle threads give up their cores.

tests/benchmarks/README.md has the gain. `--tuning false` leaves memory and threads as the libraries set them.
"""

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from train_loop.settings import Settings

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as malloc.h of the GNU C library numbers them
HOW_THREADS_WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # if one is set, the user has decided
LOOK_SECONDS = 0.25  # between two checks whether cores are short
SHORT = 0.2  # cores are short if the threads' summed wait for a core is above this share of the time
STAY_SECONDS = 5.0  # how long they then count as short


def keep_memory() -> None:
    """Makes the GNU C library keep freed memory, and torch use huge pages. Call it before torch is imported. It has no
    effect without Linux and that library.

    A training step frees and allocates buffers of hundreds of megabytes. By default each returns to the system, and
    comes back as pages of 4 KiB that are cleared one by one.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Disables garbage collection inside it, and excludes the objects made inside it from later collections. Importing
    torch and transformers makes a million lasting objects; Python would search them again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def num_threads(settings: Settings) -> int:
    """CPU threads for this process: its share of the cores, unless the settings say otherwise. By default the launcher
    sets OMP_NUM_THREADS=1: one core would work, and the others would be idle."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return settings.num_threads or max(1, num_cores() // processes_here)


def num_cores() -> int:
    """CPU cores that this process may use (a container or a scheduler may allow it fewer than there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def sharing_cores() -> Iterator[None]:
    """Inside it, threads that wait for each other sleep at once while other processes need the cores too.

    The threads of GNU OpenMP, which torch's Linux wheels include, spin for milliseconds before they sleep. On an idle
    machine that is fast. On a busy one, a thread spins on a core that the thread it waits for may need. The library has
    a documented rule (GOMP_SPINCOUNT in its manual): threads hardly spin if their process has more of them than there
    are cores. So while cores are short, this process holds extra threads that do nothing. The number of threads that
    share a computation does not change, so its results do not change.

    It has no effect if one of `HOW_THREADS_WAIT` is set, or if Linux's /proc is absent.
    """
    if any(name in os.environ for name in HOW_THREADS_WAIT) or not os.path.exists("/proc/self/schedstat"):
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch_cores, args=(over,), daemon=True, name="sharing_cores")
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch_cores(over: threading.Event) -> None:
    waited, short_until, let_go = seconds_without_core(), 0.0, None
    while not over.wait(LOOK_SECONDS):
        before, waited, now = waited, seconds_without_core(), time.monotonic()
        if waited - before > SHORT * LOOK_SECONDS:
            short_until = now + STAY_SECONDS
        if now < short_until and let_go is None:
            let_go = hold_threads()
        elif now > short_until and let_go is not None:
            let_go.set()
            let_go = None
    if let_go is not None:
        let_go.set()


def seconds_without_core() -> float:
    """Seconds that this process's threads were ready to run without a core, summed over live threads."""
    nanoseconds = 0
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # thread has ended
            nanoseconds += int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[1])
    return nanoseconds / 1e9


def hold_threads() -> threading.Event:
    """Keeps more OpenMP threads in this process than there are cores, until the event is set."""
    import torch

    let_go, size = threading.Event(), torch.get_num_threads()

    def hold_a_team() -> None:  # a Python thread that computes gets its own team of OpenMP threads
        torch.zeros(2**15 * size, dtype=torch.uint8).add_(1)  # large enough to use the complete team
        let_go.wait()

    for _ in range((num_cores() - size) // (size - 1) + 1 if size > 1 else 0):
        threading.Thread(target=hold_a_team, daemon=True, name="idle_team").start()
    return let_go
