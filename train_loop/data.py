"""Rows of text become equal blocks of tokens:

    1. rows      load_rows       read by `datasets`; a line of a text file is a row, with its newline; a blank one is ""
    2. tokens    tokenize_rows   each row as `tokenizer(row)` does, one after the other, in one file of int32 on disk
    3. blocks    group_texts     the whole split's tokens cut every `block_size`; what is left at the end is dropped
    4. windows   Windows         the micro-batches of one optimizer step, for one process, from an order of blocks

B: blocks in a micro-batch, T: tokens in a block, M: micro-batches in a window.
"""

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
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
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
        raise ValueError(f"{path} cannot be read as {kind}: {one_line(error)}") from error
    return datasets.Dataset(rows.data, info=rows.info, fingerprint=digest)


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


def tokenize_rows(rows, tokenizer, name, show_progress):
    """The tokens of all rows, one after the other: a read-only memory-mapped array [tokens] of int32.

    They are kept in the `datasets` cache under a name made of what they depend on: the rows and the tokenizer.
    Raises ValueError for a row that is null.
    """
    recipe = [rows._fingerprint, type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), "v1"]
    path = _cache() / "tokens" / f"{hashlib.blake2b(json.dumps(recipe).encode(), digest_size=16).hexdigest()}.int32"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # of several processes one does it, the others wait and find it done
        if not path.exists():
            _write_tokens(path, rows, tokenizer, name, show_progress)
    if path.stat().st_size == 0:
        raise ValueError(f"the {name} data has no tokens: every row is empty")
    return np.memmap(path, dtype=np.int32, mode="r")


def _write_tokens(path, rows, tokenizer, name, show_progress):
    partial = path.with_suffix(".partial")
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
                np.fromiter((token for row in ids for token in row), dtype=np.int32).tofile(file)
                bar.update(len(texts))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass
class Split:
    """The blocks of a split, [num_blocks, T] of int32 on disk, and what they were cut from."""

    name: str
    blocks: np.ndarray
    num_rows: int
    num_tokens: int
    num_dropped: int  # tokens left over at the end


def load_split(rows, tokenizer, name, block_size, max_blocks=None, show_progress=False):
    """`rows` as a `Split`. Raises ValueError where they are fewer tokens than one block."""
    tokens = tokenize_rows(rows, tokenizer, name, show_progress)
    blocks, num_dropped = group_texts([tokens], block_size)
    if not len(blocks):
        raise ValueError(f"the {name} data has {len(tokens):,} tokens, less than one block of {block_size}")
    return Split(name, blocks[:max_blocks], len(rows), len(tokens), num_dropped)


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
    """This process's part of each optimizer step: item i is (input_ids, labels), each [M, B, T] of int64.

    A window takes the next `world_size * M * B` blocks of `order`. A last, short one takes as many micro-batches as
    its blocks need, filled up with blocks that have no targets: each block is seen once, and every process has the
    same number of micro-batches. `labels` equal `input_ids`: the shift to the next token happens in the loss.
    """

    def __init__(self, blocks, order, micro_batch_size, num_micro_batches, world_size=1, rank=0):
        self.blocks, self.order = blocks, order
        self.micro_batch_size, self.world_size, self.rank = micro_batch_size, world_size, rank
        self.blocks_per_window = world_size * num_micro_batches * micro_batch_size

    def __len__(self):
        return -(-len(self.order) // self.blocks_per_window)

    def __getitem__(self, window):
        indices = self.order[window * self.blocks_per_window :][: self.blocks_per_window]
        num_fillers = -len(indices) % (self.world_size * self.micro_batch_size)
        indices = np.concatenate([indices, np.full(num_fillers, -1)])
        indices = indices.reshape(-1, self.world_size, self.micro_batch_size)[:, self.rank]
        input_ids = torch.from_numpy(self.blocks[indices].astype(np.int64))
        return input_ids, input_ids.masked_fill(torch.from_numpy(indices == -1)[..., None], IGNORED)


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
