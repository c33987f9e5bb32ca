"""Sources of streamed training data (`--streaming`): rows in chunks, from any place.

`chunks(place)` yields all chunks from a place on (None: the beginning), each with the place where it begins.
`texts(place, chunk)` returns the chunk's rows. It is slower: a process calls it only for chunks that it tokenises.
`columns` are those that are read. `files` check whether they have changed. A place is JSON and is saved in
checkpoints.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from train_loop.data import text_files
from train_loop.data.columns import Row, RowColumns, columns_meant, num_characters
from train_loop.data.formats import format_of
from train_loop.data.row_files import Rows, digest_of, warn_of_left_out
from train_loop.data.rows import load_file
from train_loop.data.tokens import ROWS_PER_BATCH
from train_loop.errors import UserError, one_line
from train_loop.files import data_files, file_kind
from train_loop.settings import Settings

CHUNK_BYTES = text_files.CHUNK_BYTES


class Source(Protocol):
    """What a stream needs of its source of rows. `FileSource` and `Table` have it."""

    columns: RowColumns
    files: Files | RemoteFiles

    def chunks(self, place: Any) -> Iterator[tuple[Any, Any]]:
        """(place, chunk) of each chunk from a place on. Raises UserError."""

    def texts(self, place: Any, chunk: Any) -> list[Row]:
        """The rows of a chunk. Raises UserError."""


def load_source(settings: Settings, validation: Rows | None = None) -> tuple[Source | None, Rows, str]:
    """(training rows, validation rows, ""). Training rows: a `FileSource` or `Table`, None when only evaluating.
    Validation rows: `validation` if given, else prepared `Rows`. Raises UserError as `rows.load_rows` does."""
    if settings.dataset_name:
        return *_load_dataset(settings, validation), ""
    if validation is None:
        assert settings.validation_file  # streaming needs one (`contradictions`)
        validation = load_file(str(settings.validation_file), settings)
    if settings.eval_only:
        return None, validation, ""
    assert settings.train_file  # else there is nothing to train on (`contradictions`)
    files = data_files(str(settings.train_file))
    warn_of_left_out(str(settings.train_file), files)
    return FileSource(Files(files.paths), settings, files.each_is_a_row), validation, ""


def _load_dataset(settings: Settings, validation: Rows | None) -> tuple[Source | None, Rows]:
    from train_loop.data.sets import find_data_set  # only here: importing `datasets` takes a second

    builder, files = find_data_set(settings)
    splits = builder.as_streaming_dataset() if files is None else files
    name = next((name for name in ("validation", "test") if name in splits), None)
    needed = "'train'" if validation else "'train' and 'validation' or 'test'"
    if (name is None and not validation) or ("train" not in splits and not settings.eval_only):
        raise UserError(f"streaming needs splits {needed}; {settings.dataset_name} has {', '.join(splits)}")

    def source_of(split: str) -> Source:
        if files is not None and all(map(os.path.isfile, files[split])):
            return FileSource(Files(files[split]), settings)
        paths = builder.config.data_files[split]
        remote = RemoteFiles(paths, [list(metadata) for metadata in paths.origin_metadata])
        if files is None:
            return Table(lambda: builder.as_streaming_dataset(split), remote, settings)
        return FileSource(remote, settings)

    if validation is None:
        held_out = source_of(str(name))

        def read() -> Iterator[Row]:
            return itertools.chain.from_iterable(held_out.texts(*chunk) for chunk in held_out.chunks(None))

        digest = digest_of([name, held_out.columns.names, *held_out.files.identity().values()])
        validation = Rows(read, digest, range(sum(1 for _ in read())), held_out.columns.kind)
    return None if settings.eval_only else source_of("train"), validation


class Files:
    """Files on this machine, as they were when the run began."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self.paths, self.kind = [str(path) for path in paths], file_kind(paths[0])
        self.seen = {path: self._look(path) for path in self.paths}

    @staticmethod
    def _look(path: str) -> tuple[int, int]:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"training file {path} cannot be read: {error.strerror}") from error
        return status.st_size, status.st_mtime_ns

    def check(self, *paths: str) -> None:
        """Raises UserError if a file (default: any of them) has changed."""
        for path in paths or self.paths:
            if self._look(path) != self.seen[path]:
                raise UserError(
                    f"training file {path} changed during the run, so data read since cannot be identified. Restore "
                    "the file and resume from the last checkpoint"
                )

    def identity(self) -> dict[str, str]:
        """Digests of the files' sizes and samples of their content, and of their modification times."""
        digest = hashlib.blake2b(digest_size=16)
        num_samples = max(2, 64 // len(self.paths))
        for path, (size, _) in self.seen.items():
            digest.update(f"{size}:".encode())
            with open(path, "rb") as file:
                for i in range(num_samples):
                    file.seek(max(0, size - (1 << 16)) * i // (num_samples - 1))
                    digest.update(file.read(1 << 16))
        times = digest_of([time for _, time in self.seen.values()])
        return {"training data": digest.hexdigest(), "training files' times of change": times}

    def summary(self) -> str:
        size = sum(size for size, _ in self.seen.values())
        return f"{len(self.paths):,} file{'s' if len(self.paths) > 1 else ''} of {size:,} bytes"


class RemoteFiles:
    """Files on the hub, as they were when the run began: the library reads one commit."""

    def __init__(self, paths: Sequence[str], versions: list[list]) -> None:
        self.paths, self.versions = [str(path) for path in paths], versions

    def check(self, *paths: str) -> None:
        pass  # a commit does not change

    def identity(self) -> dict[str, str]:
        names = [re.sub(r"@[^/]*", "", path) for path in self.paths]
        return {
            "training data": digest_of(names),
            "training files' times of change": digest_of(self.versions),
        }

    def summary(self) -> str:
        return f"{len(self.paths):,} file{'s' if len(self.paths) > 1 else ''} on the hub"


class FileSource:
    """The rows of files of one kind, here or on the hub. As in `rows.load_rows`, a row is a line of text; of several
    text files in a folder or matching a pattern, each file is a row.

    A place is [index of the file, place in it]. Reading starts there at once, but a .gz is unpacked up to it.
    """

    def __init__(self, files: Files | RemoteFiles, settings: Settings, each_is_a_row: bool = False) -> None:
        self.files = files
        self.formats = [format_of(path, each_is_a_row, streamed=True) for path in files.paths]
        self.columns = columns_meant(*self.formats[0].columns(files.paths[0]), settings, files.paths[0])

    def chunks(self, place: Any) -> Iterator[tuple[Any, Any]]:
        """(place, chunk) of each chunk, from a place on, or from the beginning. Raises UserError if a file cannot
        be read, or has changed."""
        first, within = place or (0, 0)
        for index in range(first, len(self.files.paths)):
            path = self.files.paths[index]
            for at, chunk in self.formats[index].chunks(path, within, CHUNK_BYTES, self.columns):
                self.files.check(path)
                yield [index, at], chunk
            within = 0

    def texts(self, place: Any, chunk: Any) -> list[Row]:
        """The rows of a chunk. Raises UserError for a wrong row."""
        index, within = place
        return self.formats[index].texts(self.files.paths[index], within, chunk, self.columns)


class Table:
    """The rows of data that only `datasets` can read.

    `open()` returns a new `IterableDataset`. A place is its state_dict: the shard (a file or a part of one) and the row
    in it. To reach a place, the shard's rows before it are read again, but not tokenised.
    """

    def __init__(self, open: Callable[[], Any], files: Files | RemoteFiles, settings: Settings) -> None:
        self.open, self.files = open, files
        row: dict[str, Any] = next(iter(open()), {})
        texts, chats = ([name for name, value in row.items() if isinstance(value, kind)] for kind in (str, list))
        self.columns = columns_meant(list(row), texts, chats, settings)

    def chunks(self, place: Any) -> Iterator[tuple[Any, list[Any]]]:
        """(place, cells of each row) of each chunk, from a place on, or from the beginning."""
        chunk, length = [], 0
        rows = self.open().select_columns([*self.columns.names])
        if place is not None:
            rows.load_state_dict(place)
        for row in self._read(rows):
            chunk.append([row[name] for name in self.columns.names])
            length += num_characters(chunk[-1])
            if length >= CHUNK_BYTES or len(chunk) == ROWS_PER_BATCH:
                self.files.check()
                yield place, chunk
                chunk, length, place = [], 0, rows.state_dict()
        if chunk:
            self.files.check()
            yield place, chunk

    def _read(self, rows: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from rows
        except Exception as error:  # the loader's errors have no common class
            self.files.check()
            raise UserError(f"the training data cannot be read: {one_line(error)}") from error

    def texts(self, place: Any, chunk: list[Any]) -> list[Row]:
        rows = []
        for number, values in enumerate(chunk, start=1):
            row, problem = self.columns.row_of(values)
            if problem:
                raise UserError(f"row {number:,} of the training data after {place or 'its beginning'}: {problem}")
            rows.append(row)
        return rows
