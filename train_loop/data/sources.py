"""What a stream of training data reads (`--streaming`): rows in chunks, from any place on.

A source has `chunks(place)`, all the chunks from a place on (None: the beginning), each with the place where it begins;
`texts(place, chunk)`, the chunk's rows, which takes longer and is asked for what one process tokenises alone; `column`;
and `files`, which know whether they are still the same. A place is JSON, and goes into checkpoints.
"""

import hashlib
import io
import itertools
import json
import os
import re
import zlib

from train_loop.data.rows import Rows, digest_of, load_dataset, load_file, only_text, text_column
from train_loop.data.tokens import ROWS_PER_BATCH
from train_loop.errors import UserError, one_line
from train_loop.files import file_kind, open_file, text_files, train_files

CHUNK_BYTES = 1 << 19  # some 0.1 s of tokenising; -1 reads a file to its end


def load_source(settings):
    """(training rows, validation rows, ""): a source of chunks, `Lines` or `Table`, None when only evaluating; and
    prepared `Rows`. Raises UserError as `rows.load_rows` does."""
    if settings.dataset_name:
        return *_load_dataset(settings), ""
    eval_rows = only_text(load_file(settings.validation_file), settings)
    if settings.eval_only:
        return None, eval_rows, ""
    files = Files(train_files(settings))
    if files.kind in ("text", "json"):
        return Lines(files, settings), eval_rows, ""
    import datasets  # imported where it is needed alone: that takes a second

    builder = datasets.load_dataset_builder(files.kind, data_files={"train": files.paths})
    return Table(lambda: builder.as_streaming_dataset("train"), files, settings), eval_rows, ""


def _load_dataset(settings):
    builder = load_dataset(settings, "load_dataset_builder")
    splits = builder.as_streaming_dataset()
    name = next((name for name in ("validation", "test") if name in splits), None)
    if name is None or ("train" not in splits and not settings.eval_only):
        raise UserError(
            f"streaming needs splits 'train' and 'validation' or 'test'; {settings.dataset_name} has "
            f"{', '.join(splits)}"
        )

    def table_of(split):
        return Table(lambda: builder.as_streaming_dataset(split), _files_of(builder, split), settings)

    validation = table_of(name)
    digest = digest_of([name, validation.column, *validation.files.identity().values()])
    num_rows = sum(len(rows) for _, rows in validation.chunks(None))
    eval_rows = Rows(
        lambda: itertools.chain.from_iterable(rows for _, rows in validation.chunks(None)), digest, range(num_rows)
    )
    return None if settings.eval_only else table_of("train"), eval_rows


def _files_of(builder, split):
    paths = builder.config.data_files[split]
    if all(os.path.isfile(path) for path in paths):
        return Files(paths)
    return RemoteFiles(paths, [list(metadata) for metadata in paths.origin_metadata])


class Files:
    """Files on this machine, as they were when the run began."""

    def __init__(self, paths):
        self.paths, self.kind = [str(path) for path in paths], file_kind(paths[0])
        self.seen = {path: self._look(path) for path in self.paths}

    @staticmethod
    def _look(path):
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"training file {path} cannot be read: {error.strerror}") from error
        return status.st_size, status.st_mtime_ns

    def check(self, *paths):
        """Raises UserError where a file, by default any, is no longer the one that it was."""
        for path in paths or self.paths:
            if self._look(path) != self.seen[path]:
                raise UserError(
                    f"training file {path} was changed while the run was reading it: what was read since belongs to "
                    "no data that could be named. The last checkpoint goes on with the file as it was"
                )

    def identity(self):
        """Sizes and samples of the content, without reading it all; and when each file was written last."""
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

    def summary(self):
        size = sum(size for size, _ in self.seen.values())
        return f"{len(self.paths):,} file{'s' if len(self.paths) > 1 else ''} of {size:,} bytes"


class RemoteFiles:
    """Files on the hub, as they were when the run began: the library reads those of one commit."""

    def __init__(self, paths, versions):
        self.paths, self.versions = list(paths), versions

    def check(self):
        pass  # a commit does not change

    def identity(self):
        names = [re.sub(r"@[^/]*", "", path) for path in self.paths]
        return {
            "training data": digest_of(names),
            "training files' times of change": digest_of(self.versions),
        }

    def summary(self):
        return f"{len(self.paths):,} file{'s' if len(self.paths) > 1 else ''} on the hub"


class Lines:
    """The rows of files of JSON lines or of text, .gz or not. As in `rows.load_rows` a line of text is a row, and of
    several text files that a folder or a pattern means each file is one.

    A place is [index of the file, byte in its text]; it can be gone to at once, but a .gz is unpacked up to there.
    """

    def __init__(self, files, settings):
        self.files, row = files, {"text": ""}
        self.chunk_bytes = CHUNK_BYTES if text_files(settings.train_file) is None or files.kind == "json" else -1
        if files.kind == "json":
            rows = (row for place, chunk in self.chunks(None) for _, row in self._parse(place, chunk))
            row = next(rows, {})
        self.column = _column_of(row, settings)

    def chunks(self, place):
        """(place, bytes) of each chunk, from a place on, or from the beginning. Raises UserError where a file cannot
        be read, or is no longer the one that it was."""
        first, byte = place or (0, 0)
        for index in range(first, len(self.files.paths)):
            path = self.files.paths[index]
            try:
                with open_file(path) as file:
                    file.seek(byte)
                    while chunk := file.read(self.chunk_bytes) + file.readline():
                        self.files.check(path)
                        yield [index, byte], chunk
                        byte += len(chunk)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"training file {path} cannot be read: {one_line(error)}") from error
            byte = 0

    def texts(self, place, chunk):
        """The rows of a chunk. Raises UserError where they are no text, or no JSON with text in it."""
        if self.files.kind == "json":
            texts = []
            for where, row in self._parse(place, chunk):
                texts.append(row.get(self.column))
                if not isinstance(texts[-1], str):
                    raise UserError(f"{where}: {self.column!r} is no text")
            return texts
        try:
            lines = list(io.StringIO(chunk.decode(), newline=None))
            return lines if self.chunk_bytes > 0 else ["".join(lines)]
        except UnicodeDecodeError as error:
            where = f"{self.files.paths[place[0]]}, byte {place[1] + error.start:,}"
            raise UserError(f"{where}: it is not UTF-8 text ({error.reason})") from error

    def _parse(self, place, chunk):
        """(where it is, in words, the object) of each line of JSON."""
        index, byte = place
        for line in chunk.splitlines(keepends=True):
            where, byte = f"{self.files.paths[index]}, line at byte {byte:,}", byte + len(line)
            if line.isspace():
                continue
            try:
                row, problem = json.loads(line), "it is no object"
            except ValueError as error:
                row, problem = None, str(error)
            if not isinstance(row, dict):
                raise UserError(f"{where}: {problem}; streaming reads JSON of one object a line")
            yield where, row


class Table:
    """The rows of what `datasets` streams: csv and parquet files, a folder, a data set on the hub.

    `open()` gives its `IterableDataset` anew. A place is the state_dict of that: the shard, which is a file or a part
    of one, and the row in it. Going to it reads the shard's rows up to there again; none is tokenised.
    """

    def __init__(self, open, files, settings):
        self.open, self.files, self.column = open, files, None
        self.column = _column_of(next(iter(open()), {}), settings)

    def chunks(self, place):
        """(place, texts) of each chunk, from a place on, or from the beginning."""
        texts, num_characters = [], 0
        try:
            rows = self.open().select_columns([self.column])
            if place is not None:
                rows.load_state_dict(place)
            for row in rows:
                texts.append(row[self.column])
                num_characters += len(texts[-1] or "")
                if num_characters >= CHUNK_BYTES or len(texts) == ROWS_PER_BATCH:
                    self.files.check()
                    yield place, texts
                    texts, num_characters, place = [], 0, rows.state_dict()
        except Exception as error:  # the loader's errors have no common class
            self.files.check()
            raise UserError(f"the training data cannot be read: {one_line(error)}") from error
        if texts:
            self.files.check()
            yield place, texts

    def texts(self, place, texts):
        if None in texts:
            raise UserError(f"a row of the training data is null, the {texts.index(None) + 1:,}. after {place}")
        return texts


def _column_of(row, settings):
    """The name of the column that holds the text, from the data's first row."""
    return text_column(row, [name for name, value in row.items() if isinstance(value, str)], settings)
