"""Rows of text become equal blocks of tokens:

    1. rows      load_rows       a line of a text file is a row, with its newline; a blank one is ""; or each file of a
                                 folder is one; `datasets` reads what is not a text file
    2. tokens    tokenize_rows   each row as `tokenizer(row)` does, one after the other, in one file of int32 on disk;
                                 on request with the end-of-text token after each row that is not empty
    3. blocks    group_texts     the whole split's tokens cut every `block_size`; what is left at the end is dropped
    4. windows   Windows         the micro-batches of one optimizer step, for one process, from an order of blocks

B: blocks in a micro-batch, T: tokens in a block, M: micro-batches in a window.
"""

import codecs
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from train_loop.config import file_kind, text_files
from train_loop.hub import hub_address

# rows go to the tokenizer in batches of so many, or fewer long ones; neither has any influence on the tokens
ROWS_PER_BATCH, CHARACTERS_PER_BATCH = 10_000, 1 << 19
NUM_BATCHES_AHEAD = 3  # being tokenised or waiting for it: the tokenizer's threads shall never wait for Python's
HEADER_BYTES = 16  # a file of tokens begins with two int64: the words and the bytes of its text
IGNORED = -100  # the label of a position that is no target, as in torch's cross entropy


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
        digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()
        return cls(lambda: iter(texts), digest, range(len(texts)))

    def __len__(self):
        return len(self.span)

    def __iter__(self):
        for index, text in enumerate(self.read()):
            if index in self.span:
                yield {"text": text}


def load_rows(settings):
    """(training rows, validation rows, note): each `Rows`; training rows are None when only evaluating a validation
    file. The note says where the validation rows come from.

    Raises ValueError where the data cannot be found or read, has no text column, or is empty.
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
        raise ValueError(f"{settings.dataset_name} has no split 'train'; it has {', '.join(splits)}")
    train, validation = (rows if rows is None else only_text(rows, settings) for rows in (train, validation))
    note = ""
    if validation is None:
        num_held_out = max(1, len(train) * settings.validation_split_percentage // 100)
        if num_held_out >= len(train):
            raise ValueError(f"{len(train)} training row(s): too few to hold out some; give validation_file")
        note = f"the last {num_held_out:,} of {len(train):,} training rows (validation_split_percentage)"
        validation = replace(train, span=train.span[-num_held_out:])
        train = replace(train, span=train.span[:-num_held_out])
    return train, validation, note


def load_dataset(settings, function):
    """What this function of `datasets` makes of the settings' data set. Raises ValueError where there is none."""
    import datasets  # imported where it is needed alone: that takes a second

    name, config = settings.dataset_name, settings.dataset_config_name
    try:
        return getattr(datasets, function)(name, config)
    except Exception as error:  # the loader's errors have no common class
        raise ValueError(
            f"data set {name}{f' ({config})' if config else ''} cannot be loaded: {one_line(error)}. It was looked for "
            f"as a folder here, in the cache ({cache_folder()}), and on {hub_address()}. "
            "Without the hub: fill the cache on a machine that reaches it and set HF_HUB_OFFLINE=1, or give train_file "
            "and validation_file"
        ) from error


def load_file(path):
    """A text file's lines as `Rows`, or the whole files of a folder or pattern, a row each; the `datasets.Dataset` of
    what is not text."""
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
        raise ValueError(f"{path} cannot be read as {kind}: it is not UTF-8 text ({error.reason})") from error
    except Exception as error:  # as above
        where = _broken_line(path) if kind == "json" else ""
        raise ValueError(f"{path} cannot be read as {kind}: {where or one_line(error)}") from error
    return datasets.Dataset(rows.data, info=rows.info, fingerprint=digest)


def _whole_files(files):
    """Text files as `Rows`, each of which is a row."""
    digests = []
    for path in files:
        try:
            digests.append(_scan(path)[0])
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as text: {one_line(error)}") from error
    digest = hashlib.blake2b(json.dumps(digests).encode(), digest_size=16).hexdigest()
    texts = lambda: map("".join, map(_lines, files, digests))  # noqa: E731
    return Rows(texts, digest, range(len(files)))


def open_file(path, mode="rb", **options):
    return (gzip.open if str(path).endswith(".gz") else open)(path, mode, **options)


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
    """A file's lines, each with its newline as \\n. Raises ValueError at the end if the file is no longer the one that
    had this digest: what was read then belongs to no content that could be named."""
    with open_file(path, "rt", encoding="utf-8") as file:
        yield from file
    if _scan(path)[0] != digest:
        raise ValueError(f"{path} was changed while it was read: start again")


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


def one_line(error):
    """The innermost reason of an exception, on one line, at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")


def only_text(rows, settings):
    """`Rows` of the one column that is meant, from a `datasets.Dataset`, or from `Rows`, which have a column "text"."""
    column, texts = settings.text_column, ["text"]
    if not isinstance(rows, Rows):
        kinds = rows.features.items()
        texts = [name for name, kind in kinds if getattr(kind, "dtype", "") in ("string", "large_string")]
    if column is None:
        column = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if column not in texts:
        wanted = f"no column {column!r} of text" if column else "not just one column of text"
        raise ValueError(f"the data has {wanted}; text_column may be one of: {', '.join(texts) or 'none is text'}")
    if not len(rows):
        raise ValueError("the data has no rows")
    if isinstance(rows, Rows):
        return rows
    rows = rows.select_columns([column])
    return Rows(
        lambda: chain.from_iterable(batch[column] for batch in rows.iter(100)), rows._fingerprint, range(len(rows))
    )


def tokenize_rows(rows, tokenizer, name, end_of_text=None, show_progress=False):
    """(tokens, words, bytes): the tokens of all rows, one after the other, as a read-only memory-mapped array [tokens]
    of int32, and the size of the text that they stand for (see `count_words`). `end_of_text`: the id of the token to
    put after each row that is not empty, or None.

    They are kept beside the cache of `datasets` under a name made of what they depend on: the rows and the tokenizer.
    Raises ValueError for a row that is null, OSError where the disk is full.
    """
    recipe = [rows.digest, [rows.span.start, rows.span.stop], *tokenizer_recipe(tokenizer, end_of_text)]
    key = digest_of(recipe)
    path = cache_folder() / "train_loop" / "tokens" / f"{key}.int32"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for partial in path.parent.glob("*.partial"):  # whoever died while writing it no longer holds its lock
                with contextlib.suppress(Timeout), FileLock(partial.with_suffix(".lock"), timeout=0):
                    partial.unlink(missing_ok=True)
            with FileLock(path.with_suffix(".lock")):  # of several processes one does it, the others wait for it
                if not path.exists():
                    _write_tokens(path, rows, tokenizer, name, end_of_text, show_progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                f"the tokens of the {name} data cannot be written to {path.parent}: {error.strerror}. "
                "HF_DATASETS_CACHE may name another folder"
            ) from error
    if path.stat().st_size == HEADER_BYTES:
        raise ValueError(f"the {name} data has no tokens: every row is empty")
    num_words, num_bytes = np.fromfile(path, dtype=np.int64, count=2).tolist()
    return np.memmap(path, dtype=np.int32, mode="r", offset=HEADER_BYTES), num_words, num_bytes


def tokenizer_recipe(tokenizer, end_of_text):
    """What the tokens of a row depend on, as JSON takes it."""
    tokenizer("")  # a first call may change its settings, e.g. switch off a truncation, and so its serialisation
    return [
        [str(type(tokenizer)), tokenizer.backend_tokenizer.to_str(), tokenizer.split_special_tokens],
        [end_of_text, tokenizers.__version__, "v3"],
    ]


def digest_of(recipe):
    return hashlib.blake2b(json.dumps(recipe).encode(), digest_size=16).hexdigest()


def is_plain(tokenizer):
    """Whether its class leaves a fast tokenizer's call as it is: that does nothing to the ids of its Rust part, which
    then can be asked alone, without lists of masks and strings; and by two threads, which Python code may not bear."""
    methods = ("__call__", "_encode_plus", "_convert_encoding")
    return all(getattr(type(tokenizer), m) is getattr(PreTrainedTokenizerFast, m) for m in methods)


def encode(texts, tokenizer, end_of_text):
    """The tokens of all texts, one after the other, as an array of int32; see `tokenize_rows`."""
    if is_plain(tokenizer):
        rows = (encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts))
    else:
        rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    if end_of_text is not None:
        rows = (row if not row or row[-1] == end_of_text else [*row, end_of_text] for row in rows)
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32)


def _write_tokens(path, rows, tokenizer, name, end_of_text, show_progress):
    """Writes the tokens under another name, flushes them to the disk, and renames: a kill leaves no half of them.

    The tokenizer's own threads work on one batch after the other; two threads here hand them over and make arrays of
    what comes back, while this one reads rows and writes arrays.
    """
    partial, counts, batches = path.with_suffix(".partial"), np.zeros(2, dtype=np.int64), deque()
    bar = tqdm(total=len(rows), desc=f"tokenizing {name}", unit=" rows", disable=not show_progress, leave=False)
    try:
        with open(partial, "wb") as file, bar, ThreadPoolExecutor(1 + is_plain(tokenizer)) as threads:
            file.write(counts.tobytes())
            for texts in _batches(rows, name):
                batches.append(threads.submit(encode, texts, tokenizer, end_of_text))
                if len(batches) > NUM_BATCHES_AHEAD:
                    file.write(batches.popleft().result())
                counts += sum(map(count_words, texts)), sum(len(text.encode()) for text in texts)
                bar.update(len(texts))
            for batch in batches:
                file.write(batch.result())
            file.seek(0)
            file.write(counts.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _batches(rows, name):
    """The rows' texts in lists. A line of white space alone is an empty row, as in the hub's WikiText."""
    texts, num_characters = [], 0
    for number, row in enumerate(rows, start=1):
        if row["text"] is None:
            raise ValueError(f"row {number} of the {name} data is null")
        texts.append("" if row["text"].isspace() else row["text"])
        num_characters += len(texts[-1])
        if len(texts) == ROWS_PER_BATCH or num_characters >= CHARACTERS_PER_BATCH:
            yield texts
            texts, num_characters = [], 0
    if texts:
        yield texts


def count_words(text):
    """Words as WikiText counts them: what white space separates, and one for the end of each line."""
    return len(text.split()) + text.count("\n") + (not text.endswith("\n"))


@dataclass
class Split:
    """The blocks of a split, [num_blocks, T] of int32 on disk, and what they were cut from."""

    name: str
    blocks: np.ndarray
    num_rows: int = 0
    num_tokens: int = 0
    num_words: int = 0
    num_bytes: int = 0
    num_dropped: int = 0  # tokens left over at the end
    document_end: int | None = None  # the token after which attention and positions begin anew

    @property
    def num_blocks(self):
        return len(self.blocks)

    def windows(self, settings, accelerator, position):
        """This process's windows of the epoch in which `position` is, from there to the epoch's end."""
        windows = Windows(
            self.blocks,
            shuffled(self.num_blocks, settings.seed, position.epoch),
            settings.per_device_train_batch_size,
            settings.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
            document_end=self.document_end,
        )
        return load_windows(windows, first=position.window, pin_memory=accelerator.device.type == "cuda")

    def digest(self):
        return hashlib.blake2b(np.ascontiguousarray(self.blocks), digest_size=16).hexdigest()

    def identity(self):
        """What stands for the training data in a checkpoint's identity."""
        return {"training blocks": self.digest()}

    def summary(self):
        block_size = self.blocks.shape[1]
        num_blocks = self.num_tokens // block_size
        first = f"the first {self.num_blocks:,} of " if self.num_blocks < num_blocks else ""
        return (
            f"{self.num_rows:,} rows -> {self.num_tokens:,} tokens -> {first}{num_blocks:,} blocks of {block_size}; "
            f"{self.num_dropped:,} tokens dropped"
        )


def load_split(rows, tokenizer, name, settings, show_progress=False):
    """`rows` as a `Split`; `name` is "training" or "validation". Raises ValueError where they are fewer tokens than one
    block, or where documents are to end with a token that the tokenizer lacks."""
    end_of_text = end_of_documents(tokenizer, settings)
    tokens, num_words, num_bytes = tokenize_rows(rows, tokenizer, name, end_of_text, show_progress)
    blocks, num_dropped = group_texts([tokens], settings.block_size)
    if not len(blocks):
        raise ValueError(f"the {name} data has {len(tokens):,} tokens, less than one block of {settings.block_size}")
    max_blocks = settings.max_train_samples if name == "training" else settings.max_eval_samples
    document_end = end_of_text if settings.document_attention else None
    return Split(name, blocks[:max_blocks], len(rows), len(tokens), num_words, num_bytes, num_dropped, document_end)


def end_of_documents(tokenizer, settings):
    """The id of the token that documents are to end with, or None. Raises ValueError where the tokenizer lacks it."""
    if settings.add_eos_token and tokenizer.eos_token_id is None:
        raise ValueError("add_eos_token: the tokenizer has no end-of-text token")
    return tokenizer.eos_token_id if settings.add_eos_token else None


def group_texts(rows, block_size):
    """(blocks [n, block_size], number of tokens dropped): the rows' tokens, one row after the other, cut every
    `block_size`; the tokens of a last, short block are dropped. One single array is cut where it lies, not copied."""
    tokens = rows[0] if len(rows) == 1 else np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
    num_blocks = len(tokens) // block_size
    return tokens[: num_blocks * block_size].reshape(num_blocks, block_size), len(tokens) - num_blocks * block_size


def shuffled(num_blocks, seed, epoch):
    """The order of blocks in an epoch [num_blocks]: a pure function of (seed, epoch)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_blocks)


class Windows(torch.utils.data.Dataset):
    """This process's part of each optimizer step: item i is {"input_ids", "labels"}, each [M, B, T] of int64, and with
    `document_end` also {"position_ids"}.

    A window takes the next `world_size * M * B` blocks of `order`. A last, short one takes as many micro-batches as
    its blocks need, filled up with blocks that have no targets: each block is seen once, and every process has the
    same number of micro-batches. `labels` equal `input_ids`: the shift to the next token happens in the loss.

    `num_context`: the first tokens of each block but the first are context alone, no targets (a sliding window).
    `document_end`: after this token positions begin at 0 again, and the token there is no target. From positions that
    do not rise by one, transformers' models build attention masks that keep documents apart.
    """

    def __init__(
        self, blocks, order, micro_batch_size, num_micro_batches, world_size=1, rank=0, num_context=0, document_end=None
    ):
        self.blocks, self.order, self.num_context, self.document_end = blocks, order, num_context, document_end
        self.micro_batch_size, self.world_size, self.rank = micro_batch_size, world_size, rank
        self.blocks_per_window = world_size * num_micro_batches * micro_batch_size

    def __len__(self):
        return -(-len(self.order) // self.blocks_per_window)

    def __getitem__(self, window):
        indices = self.order[window * self.blocks_per_window :][: self.blocks_per_window]
        num_fillers = -len(indices) % (self.world_size * self.micro_batch_size)
        indices = np.concatenate([indices, np.full(num_fillers, -1)])
        indices = indices.reshape(-1, self.world_size, self.micro_batch_size)[:, self.rank]
        input_ids = self.blocks[indices].astype(np.int64)
        labels = input_ids.copy()
        labels[indices > 0, : self.num_context] = IGNORED
        window = {"input_ids": input_ids, "labels": labels}
        if self.document_end is not None:
            window["position_ids"] = positions_in_documents(input_ids, self.document_end)
            labels[window["position_ids"] == 0] = IGNORED
        labels[indices == -1] = IGNORED
        return {name: torch.from_numpy(array) for name, array in window.items()}


def positions_in_documents(input_ids, document_end):
    """The position of each token [..., T] within its document, the first of the block beginning with the block."""
    index = np.arange(input_ids.shape[-1])
    begins = np.roll(input_ids == document_end, 1, axis=-1)
    return index - np.maximum.accumulate(np.where(begins & (index > 0), index, 0), axis=-1)


def load_windows(windows, first=0, pin_memory=False):
    """A DataLoader over `windows` from index `first` on. It has a generator of its own: iterating over a DataLoader
    draws from torch's global one otherwise, and evaluation would change training."""
    return torch.utils.data.DataLoader(
        windows,
        batch_size=None,
        sampler=range(first, len(windows)),
        generator=torch.Generator(),
        pin_memory=pin_memory,
    )
