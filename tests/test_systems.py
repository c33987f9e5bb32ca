"""What other systems lack: Windows has no `resource` and no `fcntl`, few signals, and flushes no folders."""

import fcntl
import os
import sys

import pytest
from conftest import TINY, run_program

from train_loop.checkpoint.durable import flush


def test_a_run_needs_nothing_that_windows_lacks(text_file, tmp_path):
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=2", f"--output_dir={tmp_path}/run"]
    done = run_program("like_windows.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "has no lock" in done.stderr


@pytest.fixture
def windows(monkeypatch):
    """Files as Windows has them: no folder can be opened, and a file is flushed through a handle that may write."""
    open_, fsync = os.open, os.fsync

    def open_file(path, flags, *more, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, flags, *more, **options)

    def flush_file(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(descriptor)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", flush_file)


def test_files_and_folders_are_flushed_as_windows_allows(windows, tmp_path):
    (tmp_path / "file").write_text("text")
    flush(tmp_path / "file")
    flush(tmp_path)
