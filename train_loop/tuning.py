"""What a process does about its memory and its threads: memory that stays, huge pages, threads that let others work.

Measured to pay (tests/benchmarks/README.md). `--tuning false` leaves memory and threads as the libraries have them.
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
HOW_THREADS_WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # with one of these the user has decided
LOOK_SECONDS = 0.25  # between two looks at whether cores are short
SHORT = 0.2  # cores are short where this process's threads together waited for one for this share of the time
STAY_SECONDS = 5.0  # how long they count as short after that


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
    """Disables garbage collection inside it, and excludes the objects made inside it from later collections. Importing
    torch and transformers makes a million objects that stay; Python would search through them again and again."""
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


@contextlib.contextmanager
def sharing_cores() -> Iterator[None]:
    """Within it, threads that wait for each other sleep at once while other processes want the cores, too.

    The threads of GNU OpenMP, which torch's wheels for Linux bring, spin for milliseconds before they sleep. On an idle
    machine that is fast. On a busy one a thread spins on one core while the thread that it waits for is waiting for a
    core. The library has a documented rule (GOMP_SPINCOUNT in its manual): in a process with more of its threads than
    there are cores, threads hardly spin. So while cores are short, this process holds more threads, which do nothing.
    The number of threads that share a computation stays as it is, and so do its results.

    It does nothing where one of `HOW_THREADS_WAIT` is set, or where there is no Linux to ask.
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
    """How long this process's threads have been ready to run and had no core, in sum over those that live now."""
    nanoseconds = 0
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            nanoseconds += int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[1])
    return nanoseconds / 1e9


def hold_threads() -> threading.Event:
    """Makes this process's OpenMP threads more than there are cores, until the event is set."""
    import torch

    let_go, size = threading.Event(), torch.get_num_threads()

    def hold_a_team() -> None:  # each thread of Python that computes gets a team of its own, which ends with it
        torch.zeros(2**15 * size, dtype=torch.uint8).add_(1)  # so many numbers that the whole team is needed
        let_go.wait()

    for _ in range((num_cores() - size) // (size - 1) + 1 if size > 1 else 0):
        threading.Thread(target=hold_a_team, daemon=True, name="idle_team").start()
    return let_go
