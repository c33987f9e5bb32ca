"""`Rows`, and how files become rows. text_files.py, json_files.py and tables.py read one kind of file each."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from train_loop.data.columns import TEXT, Row, columns_meant
from train_loop.data.formats import format_of
from train_loop.data.text_files import CHUNK_BYTES, reading
from train_loop.errors import UserError, warn
from train_loop.files import DataFiles, file_kind
from train_loop.settings import Settings


@dataclass(frozen=True)
class Rows:
    """Rows, {"text": a `columns.Row`}. Each iteration reads them again, so few are in memory at once.

    `read()` yields all rows of the data. `digest` identifies their content. `span` says which of them belong here.
    `kind` is TEXT, PROMPT or CHAT.
    """

    read: Callable[[], Iterator[Row]]
    digest: str
    span: range
    kind: str = TEXT

    @classmethod
    def of(cls, texts: list[str]) -> "Rows":
        """`Rows` of a list of texts."""
        return cls(lambda: iter(texts), digest_of(texts), range(len(texts)))

    def __len__(self) -> int:
        return len(self.span)

    def __iter__(self) -> Iterator[dict[str, Row]]:
        for index, row in enumerate(self.read()):
            if index in self.span:
                yield {"text": row}


def rows_of_files(paths: Sequence[Path | str], settings: Settings, each_is_a_row: bool = False) -> Rows:
    """The rows of files of one kind, one file after the other. Raises UserError if one cannot be read, or if
    there are no rows."""
    names = [str(path) for path in paths]
    formats = [format_of(path, each_is_a_row) for path in names]
    columns = columns_meant(*formats[0].columns(names[0]), settings, names[0])
    digests = [_digest(path) for path in names]
    num_rows = sum(format.num_rows(path) for format, path in zip(formats, names, strict=True))
    if not num_rows:
        raise UserError(f"{', '.join(names)}: the data has no rows")

    def read() -> Iterator[Row]:
        for format, path, digest in zip(formats, names, digests, strict=True):
            for place, chunk in format.chunks(path, 0, CHUNK_BYTES, columns):
                yield from format.texts(path, place, chunk, columns)
            if _digest(path) != digest:  # what was read matches no version of the file
                raise UserError(f"{path} was changed while it was read: start again")

    kinds = [file_kind(path) for path in names]
    return Rows(read, digest_of([kinds, each_is_a_row, columns.names, digests]), range(num_rows), columns.kind)


def warn_of_left_out(path: Path | str, files: DataFiles) -> None:
    if files.num_left_out and int(os.environ.get("RANK", 0)) == 0:
        which = "are not text files" if files.each_is_a_row or Path(path).is_dir() else "are of an unknown kind"
        warn(f"{path}: {files.num_left_out:,} of its files {which} and are left out")


def _digest(path: str) -> str:
    """A digest of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with reading(path), open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def cache_folder() -> Path:
    """The cache folder of `datasets`, its config.HF_DATASETS_CACHE, without importing it."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(os.path.expanduser(home), "datasets")))


def only_text(rows: Any, settings: Settings) -> Rows:
    """`Rows` of the chosen columns of a `datasets.Dataset`."""
    kinds = rows.features.items()
    texts = [name for name, kind in kinds if getattr(kind, "dtype", "") in ("string", "large_string")]
    chats = [name for name, kind in kinds if isinstance(getattr(kind, "feature", None), dict)]
    columns = columns_meant(texts + chats, texts, chats, settings)
    if not len(rows):
        raise UserError("the data has no rows")
    rows = rows.select_columns([*columns.names])

    def read() -> Iterator[Row]:
        batches = (zip(*(batch[name] for name in columns.names), strict=True) for batch in rows.iter(100))
        for number, values in enumerate(chain.from_iterable(batches), start=1):
            row, problem = columns.row_of(values)
            if problem:
                raise UserError(f"row {number:,} of {settings.dataset_name}: {problem}")
            yield row

    # private: `datasets` has no public digest of its rows. Without it the texts are read once more
    digest = getattr(rows, "_fingerprint", None)
    if digest is None:
        content = hashlib.blake2b(digest_size=16)
        for row in read():
            content.update(json.dumps(row).encode())
        digest = content.hexdigest()
    return Rows(read, digest_of([digest, columns.names]), range(len(rows)), columns.kind)


def digest_of(values: Any) -> str:
    """A digest of any JSON value. It names a cached file, or data, by what that depends on."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
