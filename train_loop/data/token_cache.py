"""The cache of tokens: files that are found again by name, and verified.

    python -m train_loop.cache list       path, size, and when each was used last
    python -m train_loop.cache clear      removes them all

A file is a header, then tokens of int32. The header holds the number of tokens, and a digest of it and of every
token: any change to the file is found when it is opened. Files that no run has opened for `MAX_DAYS` days are removed
when a new one is made.
"""

import contextlib
import hashlib
import math
import os
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from train_loop.data.row_files import cache_folder
from train_loop.errors import warn

MAX_DAYS = 60
HEADER = struct.Struct("<q40s")  # number of tokens, digest
PIECE_BYTES = 1 << 22  # as many threads as there are cores digest pieces of this size


class Damaged(Exception):
    """What is wrong with a file of tokens."""


def token_folder() -> Path:
    return cache_folder() / "train_loop" / "tokens"


def open_or_make(key: str, write: Callable[[BinaryIO], None]) -> np.ndarray:
    """The tokens of the file with this key, [n] of int32, read-only and memory-mapped.

    If the file is missing or damaged, `write(file)` writes the tokens. One process does this, and the others wait. A
    kill at any time leaves no partial file under this name: the file is written under a different name, flushed to
    disk, and renamed. Raises OSError if the folder cannot be written.
    """
    path = token_folder() / f"{key}.int32"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, Damaged):
        return _open(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        try:
            return _open(path)
        except FileNotFoundError:
            pass
        except Damaged as problem:
            warn(f"the cached tokens {path} are damaged ({problem}): the rows are tokenised again")
        _remove(MAX_DAYS)
        _make(path, write)
        return _open(path)


def _open(path: Path) -> np.ndarray:
    """As `open_or_make`. Raises Damaged, or FileNotFoundError."""
    size = path.stat().st_size
    if size < HEADER.size:
        raise Damaged(f"it has {size:,} bytes")
    with open(path, "rb") as file:
        num_tokens, digest = HEADER.unpack(file.read(HEADER.size))
    if size != HEADER.size + 4 * num_tokens:
        raise Damaged(f"it has {size:,} bytes instead of {HEADER.size + 4 * num_tokens:,}")
    tokens = _mapped(path, num_tokens)
    if _digest(tokens) != digest:
        raise Damaged("its content is not what was written")
    with contextlib.suppress(OSError):  # another user's file, or a read-only disk
        os.utime(path, (time.time(), path.stat().st_mtime))  # it was used now
    return tokens


def _mapped(path: Path, num_tokens: int) -> np.ndarray:
    return np.memmap(path, np.int32, "r", HEADER.size) if num_tokens else np.empty(0, np.int32)


def _make(path: Path, write: Callable[[BinaryIO], None]) -> None:
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            file.write(bytes(HEADER.size))
            write(file)
            num_tokens = (file.tell() - HEADER.size) // 4
            file.flush()
            digest = _digest(_mapped(partial, num_tokens))
            file.seek(0)
            file.write(HEADER.pack(num_tokens, digest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _digest(tokens: np.ndarray) -> bytes:
    """A digest of every byte. Threads digest the pieces in parallel: hashlib releases the GIL."""
    data = tokens.view(np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        pieces = [data[i : i + PIECE_BYTES] for i in range(0, len(data), PIECE_BYTES)]
        digests = list(threads.map(lambda piece: hashlib.blake2b(piece).digest(), pieces))
    return hashlib.blake2b(repr(len(tokens)).encode() + b"".join(digests), digest_size=40).digest()


def cached_tokens() -> Iterator[tuple[Path, int, float]]:
    """(path, bytes, time of last use in seconds since 1970) of each file of tokens."""
    for path in sorted(token_folder().glob("*.int32")):
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            status = path.stat()
            yield path, status.st_size, max(status.st_atime, status.st_mtime)


def _remove(days: float) -> list[int]:
    """Removes files of tokens not used for `days`, and partial files of killed processes. Returns the sizes in bytes of
    the former."""
    for partial in token_folder().glob("*.partial"):  # left by a process that died: its lock is free
        with contextlib.suppress(Timeout), FileLock(partial.with_suffix(".lock"), timeout=0):
            partial.unlink(missing_ok=True)
    sizes = []
    for path, size, used in list(cached_tokens()):
        if used <= time.time() - days * 86_400:
            with contextlib.suppress(PermissionError):  # Windows does not remove a file that a run has open
                path.unlink(missing_ok=True)
                sizes.append(size)
    return sizes


def clear_cached_tokens() -> list[int]:
    """Removes all files of tokens; returns their sizes. A run that has a file open keeps it until the run ends. On
    Windows such a file stays."""
    return _remove(-math.inf)
