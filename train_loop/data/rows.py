"""Rows of text, from files, a folder of them, a data set of the hub, or Python itself. A line of a text file is a row,
with its newline; a blank one is ""; or each file of a folder is one; `datasets` reads what is not a text file.
"""

import codecs
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from train_loop.errors import UserError, one_line
from train_loop.files import file_kind, open_file, text_files
from train_loop.hub import hub_address


@dataclass(frozen=True)
class Rows:
    """Rows of text, {"text": ...}, that are read anew each time they are gone through: few are in memory at once.

    `read()` goes through all the texts there are, `digest` stands for their content, `span` says which are meant.
    """

    read: Callable
    digest: str
    span: range

    @classmethod
    def of(cls, texts):
        """`Rows` of a list of texts."""
        return cls(lambda: iter(texts), digest_of(texts), range(len(texts)))

    def __len__(self):
        return len(self.span)

    def __iter__(self):
        for index, text in enumerate(self.read()):
            if index in self.span:
                yield {"text": text}


def load_rows(settings):
    """(training rows, validation rows, note): each `Rows`; training rows are None when only evaluating a validation
    file. The note says where the validation rows come from.

    Raises UserError where the data cannot be found or read, has no text column, or is empty.
    """
    if settings.dataset_name == "python_docs":
        from pydoc_data.topics import topics  # the language reference's help texts: prose, and in every Python

        splits = {"train": Rows.of([topics[name] for name in sorted(topics)])}
    elif settings.dataset_name:
        splits = load_dataset(settings, "load_dataset")
    else:
        files = {"train": settings.train_file, "validation": settings.validation_file}
        splits = {split: load_file(path) for split, path in files.items() if path}
    train, validation = splits.get("train"), splits.get("validation", splits.get("test"))
    if train is None and not (settings.eval_only and validation is not None):
        raise UserError(f"{settings.dataset_name} has no split 'train'; it has {', '.join(splits)}")
    train, validation = (rows if rows is None else only_text(rows, settings) for rows in (train, validation))
    note = ""
    if validation is None:
        num_held_out = max(1, len(train) * settings.validation_split_percentage // 100)
        if num_held_out >= len(train):
            raise UserError(f"{len(train)} training row(s): too few to hold out some; give validation_file")
        note = f"the last {num_held_out:,} of {len(train):,} training rows (validation_split_percentage)"
        validation = replace(train, span=train.span[-num_held_out:])
        train = replace(train, span=train.span[:-num_held_out])
    return train, validation, note


def load_dataset(settings, function):
    """What this function of `datasets` makes of the settings' data set. Raises UserError where there is none."""
    import datasets  # imported where it is needed alone: that takes a second

    name, config = settings.dataset_name, settings.dataset_config_name
    try:
        return getattr(datasets, function)(name, config)
    except Exception as error:  # the loader's errors have no common class
        raise UserError(
            f"data set {name}{f' ({config})' if config else ''} cannot be loaded: {one_line(error)}. It was looked for "
            f"as a folder here, in the cache ({cache_folder()}), and on {hub_address()}. "
            "Without the hub: fill the cache on a machine that reaches it and set HF_HUB_OFFLINE=1, or give train_file "
            "and validation_file"
        ) from error


def load_file(path):
    """A text file's lines as `Rows`, or the whole files of a folder or pattern, a row each; of what is not text a
    `datasets.Dataset`, of which `only_text` makes `Rows`."""
    if (files := text_files(path)) is not None:
        return _whole_files(files)
    kind = file_kind(path)
    try:
        digest, num_lines = _scan(path, is_text=kind != "parquet")
        if kind == "text":
            return Rows(lambda: _lines(path, digest), digest, range(num_lines))
        import datasets  # as above

        # `datasets` knows a file by path and time of change; the digest in the folder's name makes it know the content
        rows = datasets.load_dataset(
            kind,
            data_files={"train": str(Path(path).resolve())},
            split="train",
            cache_dir=str(cache_folder() / "train_loop" / digest),
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as {kind}: it is not UTF-8 text ({error.reason})") from error
    except Exception as error:  # as above
        where = _broken_line(path) if kind == "json" else ""
        raise UserError(f"{path} cannot be read as {kind}: {where or one_line(error)}") from error
    return datasets.Dataset(rows.data, info=rows.info, fingerprint=digest)


def _whole_files(files):
    """Text files as `Rows`, each of which is a row."""
    digests = []
    for path in files:
        try:
            digests.append(_scan(path)[0])
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text: {one_line(error)}") from error
    texts = lambda: map("".join, map(_lines, files, digests))  # noqa: E731
    return Rows(texts, digest_of(digests), range(len(files)))


def _scan(path, is_text=True):
    """(digest, number of lines) of a file's content, unpacked. A line ends as in Python, with \\n, \\r\\n or \\r.
    Raises UnicodeDecodeError where a text is not UTF-8."""
    digest, num_lines, last = hashlib.blake2b(digest_size=16), 0, "\n"
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    with open_file(path) as file:
        chunk = None
        while chunk != b"":  # the empty one at the end too: the decoder may still hold something back
            chunk = file.read(1 << 20)
            digest.update(chunk)
            text = decoder.decode(chunk, final=not chunk) if is_text else ""
            num_lines, last = num_lines + text.count("\n"), text[-1:] or last
    return digest.hexdigest(), num_lines + (last != "\n")


def _lines(path, digest):
    """A file's lines, each with its newline as \\n. Raises UserError at the end if the file is no longer the one that
    had this digest: what was read then belongs to no content that could be named."""
    with open_file(path, "rt", encoding="utf-8") as file:
        yield from file
    if _scan(path)[0] != digest:
        raise UserError(f"{path} was changed while it was read: start again")


def _broken_line(path):
    """Where the first line that is no JSON stands, in words; "" if each is, or none, as in a file of one value."""
    try:
        with open_file(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    json.loads(line)
                except ValueError as error:
                    return f"line {number}: {error}"
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        return one_line(error)
    return ""


def cache_folder():
    """The cache folder of `datasets`, its config.HF_DATASETS_CACHE, without importing it."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(os.path.expanduser(home), "datasets")))


def only_text(rows, settings):
    """`Rows` of the one column that is meant, from a `datasets.Dataset`, or from `Rows`, which have a column "text"."""
    texts = ["text"]
    if not isinstance(rows, Rows):
        kinds = rows.features.items()
        texts = [name for name, kind in kinds if getattr(kind, "dtype", "") in ("string", "large_string")]
    column = text_column(texts, texts, settings)
    if not len(rows):
        raise UserError("the data has no rows")
    if isinstance(rows, Rows):
        return rows
    rows = rows.select_columns([column])
    return Rows(
        lambda: chain.from_iterable(batch[column] for batch in rows.iter(100)), rows._fingerprint, range(len(rows))
    )


def text_column(columns, texts, settings):
    """The name of the column that is meant, one of `columns`; `texts`: those of them that are known to hold text.
    Raises UserError where there is none, or not just one."""
    column = settings.text_column or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if column not in columns:
        wanted = f"no column {column!r} of text" if column else "not just one column of text"
        raise UserError(f"the data has {wanted}; text_column may be one of: {', '.join(texts) or 'none is text'}")
    return column


def digest_of(values):
    """A digest of anything that JSON can say: what it depends on makes the name of a cached file, or of data."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
