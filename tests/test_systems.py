"""What other systems lack: Windows has no `resource` and no `fcntl`, few signals, and flushes no folders."""

import fcntl
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROGRAMS, TINY
from forks import forked

from train_loop.checkpoint.durable import flush
from train_loop.data import token_cache


def test_a_run_needs_nothing_that_windows_lacks(text_file, tmp_path):
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=2", f"--output_dir={tmp_path}/run"]
    done = forked(PROGRAMS / "like_windows.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "has no lock" in done.stderr


@pytest.fixture
def windows(monkeypatch):
    """Files as Windows has them: no folder can be opened, a file is flushed through a handle that may write, and a file
    that this process has mapped into its memory is neither removed nor replaced."""
    open_, fsync, unlink, replace = os.open, os.fsync, Path.unlink, os.replace

    def open_file(path, flags, *more, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, flags, *more, **options)

    def flush_file(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(descriptor)

    def refuse_if_mapped(path):
        with open("/proc/self/maps") as maps:
            if any(line.rstrip().endswith(f" {path}") for line in maps):
                raise PermissionError(13, "Access is denied", str(path))

    def remove_file(path, missing_ok=False):
        refuse_if_mapped(path)
        unlink(path, missing_ok)

    def replace_file(source, target, *more, **options):
        refuse_if_mapped(source)
        refuse_if_mapped(target)
        replace(source, target, *more, **options)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", flush_file)
    monkeypatch.setattr(Path, "unlink", remove_file)
    monkeypatch.setattr(os, "replace", replace_file)


def test_files_and_folders_are_flushed_as_windows_allows(windows, tmp_path):
    (tmp_path / "file").write_text("text")
    flush(tmp_path / "file")
    flush(tmp_path)


def test_the_cache_of_tokens_replaces_and_removes_no_file_that_is_open(windows, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))

    def make(*tokens):
        return token_cache.open_or_make("key", lambda file: file.write(np.array(tokens, np.int32).tobytes()))

    make(1, 2, 3)
    (path,) = token_cache.token_folder().glob("*.int32")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")  # damaged: it is made again, in the place of the old one
    tokens = make(1, 2, 3)
    assert tokens.tolist() == [1, 2, 3]
    assert token_cache.clear_cached_tokens() == [] and path.exists(), "a run has it open"
    del tokens
    assert token_cache.clear_cached_tokens() == [token_cache.HEADER.size + 3 * 4]
    assert not path.exists()
