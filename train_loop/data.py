"""Rows of text become equal blocks of tokens:

    1. rows      load_rows       read by `datasets`; a line of a text file is a row, with its newline; a blank one is ""
    2. tokens    tokenize_rows   each row as `tokenizer(row)` does, one after the other, in one file of int32 on disk;
                                 on request with the end-of-text token after each row that is not empty
    3. blocks    group_texts     the whole split's tokens cut every `block_size`; what is left at the end is dropped
    4. windows   Windows         the micro-batches of one optimizer step, for one process, from an order of blocks

B: blocks in a micro-batch, T: tokens in a block, M: micro-batches in a window.
"""

import codecs
import gzip
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from train_loop.config import file_kind
from train_loop.hub import hub_address

ROWS_PER_BATCH = 1000  # rows tokenised at once; has no influence on the tokens
IGNORED = -100  # the label of a position that is no target, as in torch's cross entropy


def load_rows(settings):
    """(training rows, validation rows, note): each a `datasets.Dataset` with the one column "text"; training rows are
    None when only evaluating a validation file. The note says where the validation rows come from.

    Raises ValueError where the data cannot be found or read, has no text column, or is empty.
    """
    if settings.dataset_name == "python_docs":
        from pydoc_data.topics import topics  # the language reference's help texts: prose, and in every Python

        splits = {"train": datasets.Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]})}
    elif settings.dataset_name:
        splits = _load_dataset(settings)
    else:
        files = {"train": settings.train_file, "validation": settings.validation_file}
        splits = {split: _load_file(path) for split, path in files.items() if path}
    train, validation = splits.get("train"), splits.get("validation", splits.get("test"))
    if train is None and not (settings.eval_only and validation is not None):
        raise ValueError(f"{settings.dataset_name} has no split 'train'; it has {', '.join(splits)}")
    note = ""
    if validation is None:
        num_held_out = max(1, len(train) * settings.validation_split_percentage // 100)
        if num_held_out >= len(train):
            raise ValueError(f"{len(train)} training row(s): too few to hold out some; give validation_file")
        note = f"the last {num_held_out:,} of {len(train):,} training rows (validation_split_percentage)"
        validation = train.select(range(len(train) - num_held_out, len(train)))
        train = train.select(range(len(train) - num_held_out))
    train, validation = (rows and _only_text(rows, settings) for rows in (train, validation))
    return train, validation, note


def _load_dataset(settings):
    name, config = settings.dataset_name, settings.dataset_config_name
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # the loader's errors have no common class
        raise ValueError(
            f"data set {name}{f' ({config})' if config else ''} cannot be loaded: {one_line(error)}. It was looked for "
            f"as a folder here, in the cache ({datasets.config.HF_DATASETS_CACHE}), and on {hub_address()}. "
            "Without the hub: fill the cache on a machine that reaches it and set HF_HUB_OFFLINE=1, or give train_file "
            "and validation_file"
        ) from error


def _load_file(path):
    kind, digest = file_kind(path), hashlib.blake2b(digest_size=16)
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if kind != "parquet" and not str(path).endswith(".gz"):
                try:
                    decoder.decode(chunk)
                except UnicodeDecodeError as error:  # said here: `datasets` finds some of it only when rows are used
                    raise ValueError(
                        f"{path} cannot be read as {kind}: it is not UTF-8 text ({error.reason})"
                    ) from error
    digest = digest.hexdigest()
    try:
        # `datasets` knows a file by path and time of change; the digest in the folder's name makes it know the content
        rows = datasets.load_dataset(
            kind,
            data_files={"train": str(Path(path).resolve())},
            split="train",
            cache_dir=str(_cache() / digest),
            **({"keep_linebreaks": True} if kind == "text" else {}),
        )
    except Exception as error:  # as above
        where = _broken_line(path) if kind == "json" else ""
        raise ValueError(f"{path} cannot be read as {kind}: {where or one_line(error)}") from error
    return datasets.Dataset(rows.data, info=rows.info, fingerprint=digest)


def _broken_line(path):
    """Where the first line that is no JSON stands, in words; "" if each is, or none, as in a file of one value."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    json.loads(line)
                except ValueError as error:
                    return f"line {number}: {error}"
    except (OSError, EOFError, UnicodeError) as error:
        return one_line(error)
    return ""


def _cache():
    return Path(datasets.config.HF_DATASETS_CACHE) / "train_loop"


def one_line(error):
    """The innermost reason of an exception, on one line, at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")


def _only_text(rows, settings):
    column = settings.text_column
    texts = [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    if column is None:
        column = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if column not in texts:
        wanted = f"no column {column!r} of text" if column else "not just one column of text"
        raise ValueError(f"the data has {wanted}; text_column may be one of: {', '.join(texts) or 'none is text'}")
    if not len(rows):
        raise ValueError("the data has no rows")
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def tokenize_rows(rows, tokenizer, name, end_of_text=None, show_progress=False):
    """(tokens, words, bytes): the tokens of all rows, one after the other, as a read-only memory-mapped array [tokens]
    of int32, and the size of the text that they stand for (see `count_words`). `end_of_text`: the id of the token to
    put after each row that is not empty, or None.

    They are kept in the `datasets` cache under a name made of what they depend on: the rows and the tokenizer.
    Raises ValueError for a row that is null.
    """
    recipe = [rows._fingerprint, type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), end_of_text, "v2"]
    path = _cache() / "tokens" / f"{hashlib.blake2b(json.dumps(recipe).encode(), digest_size=16).hexdigest()}.int32"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # of several processes one does it, the others wait and find it done
        if not path.exists():
            _write_tokens(path, rows, tokenizer, name, end_of_text, show_progress)
    if path.stat().st_size == 0:
        raise ValueError(f"the {name} data has no tokens: every row is empty")
    counts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return np.memmap(path, dtype=np.int32, mode="r"), counts["words"], counts["bytes"]


def _write_tokens(path, rows, tokenizer, name, end_of_text, show_progress):
    partial, num_words, num_bytes = path.with_suffix(".partial"), 0, 0
    try:
        with (
            open(partial, "wb") as file,
            tqdm(
                total=len(rows), desc=f"tokenizing {name}", unit=" rows", disable=not show_progress, leave=False
            ) as bar,
        ):
            for start in range(0, len(rows), ROWS_PER_BATCH):
                texts = rows[start : start + ROWS_PER_BATCH]["text"]
                if None in texts:
                    raise ValueError(f"row {start + texts.index(None) + 1} of the {name} data is null")
                # a line of white space alone is an empty row, as in the hub's WikiText
                texts = ["" if text.isspace() else text for text in texts]
                ids = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
                if end_of_text is not None:
                    ids = [row if not row or row[-1] == end_of_text else [*row, end_of_text] for row in ids]
                np.fromiter((token for row in ids for token in row), dtype=np.int32).tofile(file)
                num_words += sum(map(count_words, texts))
                num_bytes += sum(len(text.encode()) for text in texts)
                bar.update(len(texts))
        path.with_suffix(".json").write_text(json.dumps({"words": num_words, "bytes": num_bytes}), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


def load_split(rows, tokenizer, name, settings, show_progress=False):
    """`rows` as a `Split`; `name` is "training" or "validation". Raises ValueError where they are fewer tokens than one
    block, or where documents are to end with a token that the tokenizer lacks."""
    if settings.add_eos_token and tokenizer.eos_token_id is None:
        raise ValueError("add_eos_token: the tokenizer has no end-of-text token")
    end_of_text = tokenizer.eos_token_id if settings.add_eos_token else None
    tokens, num_words, num_bytes = tokenize_rows(rows, tokenizer, name, end_of_text, show_progress)
    blocks, num_dropped = group_texts([tokens], settings.block_size)
    if not len(blocks):
        raise ValueError(f"the {name} data has {len(tokens):,} tokens, less than one block of {settings.block_size}")
    max_blocks = settings.max_train_samples if name == "training" else settings.max_eval_samples
    document_end = end_of_text if settings.document_attention else None
    return Split(name, blocks[:max_blocks], len(rows), len(tokens), num_words, num_bytes, num_dropped, document_end)


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
