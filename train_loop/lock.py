"""One output_dir has one living run: it holds a lock, which the kernel releases however the run ends.

The lock is POSIX's record lock (`fcntl.lockf`) on the file output_dir/.lock. Two reasons for this kind of lock: NFS,
Lustre and GPFS carry it between hosts, and no child process inherits it, so neither a fork nor a hub client that
outlives its run can hold it. It has one weakness: a process loses the lock when it closes any other descriptor of the
same file. So nothing else in this package opens that file.

The file says who holds the lock. It is removed at the end. A killed run leaves the file, which does no harm: the lock
counts, not the file.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from train_loop.errors import UserError, warn

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]  # mypy knows Linux, which has it

NAME = ".lock"
PATIENCE = 1  # seconds that a new run waits: the other one may be ending, or may not have written its name yet
RESTART_PATIENCE = 30  # for a run that its launcher restarts: on a different host processes may still be ending


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the lock of `folder`. The folder is created if it is missing, and removed at the end if it is empty.

    Raises UserError, which names the holder, if another process holds the lock; OSError if the folder cannot be
    written.
    """
    if fcntl is None:
        folder.mkdir(parents=True, exist_ok=True)
        warn(f"this system has no lock for {folder}: make sure that no other run uses it")
        yield
        return
    # the launcher's variables say whether it restarts a run by itself
    restarts = any(int(os.environ.get(f"TORCHELASTIC_{name}", 0)) > 0 for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    descriptor, made = _taken(folder, time.monotonic() + (RESTART_PATIENCE if restarts else PATIENCE))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(folder / NAME)  # before the lock is released: a waiting run then creates a new file
            for path in made:
                os.rmdir(path)  # raises if the folder is not empty, and then it stays
        os.close(descriptor)


def _taken(folder: Path, deadline: float) -> tuple[int, list[Path]]:
    """(descriptor of the locked file, folders that were created for it, innermost first)."""
    while True:
        path, made = folder / NAME, [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another run has just ended and removed the folder
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of the two depends on the system
            holder = os.pread(descriptor, 1000, 0)
            os.close(descriptor)
            if time.monotonic() >= deadline + (0 if holder else 10):
                raise UserError(_refusal(folder, holder)) from None
            time.sleep(0.1)
            continue
        except OSError as error:
            warn(f"{folder} is on a disk without locks ({error.strerror}): make sure that no other run uses it")
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # its holder ended and removed it in between
    own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(descriptor, 0)
    with contextlib.suppress(OSError):  # the disk is full: the lock holds anyway
        os.pwrite(descriptor, json.dumps(own).encode(), 0)
    return descriptor, made


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _refusal(folder: Path, holder: bytes) -> str:
    try:
        found = json.loads(holder)
        who = f"process {found['pid']} on host {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):  # the holder has not written its name yet
        who = "another process"
    return f"output_dir {folder} is used by another run: {who}. Wait for it, stop it, or choose another output_dir"
