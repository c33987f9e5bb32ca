"""Rows of text become tokens, in one file of int32 on disk that later runs find again.

Each row is tokenised as `tokenizer(row)` does, one after the other; on request with the end-of-text token after each
row that is not empty.
"""

import contextlib
import errno
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import tokenizers
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from train_loop.data.rows import cache_folder, digest_of
from train_loop.errors import UserError

# rows go to the tokenizer in batches of so many, or fewer long ones; neither has any influence on the tokens
ROWS_PER_BATCH, CHARACTERS_PER_BATCH = 10_000, 1 << 19
NUM_BATCHES_AHEAD = 3  # being tokenised or waiting for it: the tokenizer's threads shall never wait for Python's
HEADER_BYTES = 16  # a file of tokens begins with two int64: the words and the bytes of its text


def tokenize_rows(rows, tokenizer, name, end_of_text=None, show_progress=False):
    """(tokens, words, bytes): the tokens of all rows, one after the other, as a read-only memory-mapped array [tokens]
    of int32, and the size of the text that they stand for (see `count_words`). `end_of_text`: the id of the token to
    put after each row that is not empty, or None.

    They are kept beside the cache of `datasets` under a name made of what they depend on: the rows and the tokenizer.
    Raises UserError for a row that is null, OSError where the disk is full.
    """
    key = digest_of([rows.digest, [rows.span.start, rows.span.stop], *tokenizer_recipe(tokenizer, end_of_text)])
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
            raise UserError(
                f"the tokens of the {name} data cannot be written to {path.parent}: {error.strerror}. "
                "HF_DATASETS_CACHE may name another folder"
            ) from error
    if path.stat().st_size == HEADER_BYTES:
        raise UserError(f"the {name} data has no tokens: every row is empty")
    num_words, num_bytes = np.fromfile(path, dtype=np.int64, count=2).tolist()
    return np.memmap(path, dtype=np.int32, mode="r", offset=HEADER_BYTES), num_words, num_bytes


def tokenizer_recipe(tokenizer, end_of_text):
    """What the tokens of a row depend on, as JSON takes it."""
    tokenizer("")  # a first call may change its settings, e.g. switch off a truncation, and so its serialisation
    return [
        [str(type(tokenizer)), tokenizer.backend_tokenizer.to_str(), tokenizer.split_special_tokens],
        [end_of_text, tokenizers.__version__, "v3"],
    ]


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
            raise UserError(f"row {number} of the {name} data is null")
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
