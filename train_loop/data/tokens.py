"""Rows of text become tokens, in one file of int32 on disk that later runs find again.

Each row is tokenised as `tokenizer(row)` does, one after the other; on request with the end-of-text token after each
row, of which the empty ones then have no tokens.
"""

import errno
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from train_loop.data import token_cache
from train_loop.data.row_files import Rows, digest_of
from train_loop.errors import UserError

# rows go to the tokenizer in batches of so many, or fewer long ones; neither has any influence on the tokens
ROWS_PER_BATCH, CHARACTERS_PER_BATCH = 10_000, 1 << 19
NUM_BATCHES_AHEAD = 3  # being tokenised or waiting for it: the tokenizer's threads shall never wait for Python's
# the code that makes tokens out of files: a change in any of it makes new ones
CODE_FILES = ("formats.py", "json_files.py", "row_files.py", "tables.py", "text_files.py", "tokens.py")
CODE = digest_of([Path(__file__).with_name(name).read_text(encoding="utf-8") for name in CODE_FILES])
# of a cache that is full, or that may not be written
CACHE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
)


def tokenize_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    end_of_text: int | None = None,
    show_progress: bool = False,
) -> np.ndarray:
    """The tokens of all rows, one after the other: a memory-mapped array [tokens] of int32, read-only. `end_of_text` is
    the id of the token to put after each row that is not empty, or None.

    They are kept beside the cache of `datasets` under a name made of what they depend on: the rows, the tokenizer and
    the code. They are verified when they are opened, and damaged ones are made again. Raises UserError for a row that
    is null, and where the cache cannot be written.
    """
    span = [rows.span.start, rows.span.stop]
    key = digest_of([rows.digest, span, *tokenizer_recipe(tokenizer, end_of_text), CODE])

    def write(file: BinaryIO) -> None:
        _write_tokens(file, rows, tokenizer, name, end_of_text, show_progress)

    try:
        tokens = token_cache.open_or_make(key, write)
    except OSError as error:
        if error.errno not in CACHE_ERRORS:
            raise
        raise UserError(
            f"the tokens of the {name} data cannot be written to {token_cache.token_folder()}: {error.strerror}. Set "
            "HF_DATASETS_CACHE (or HF_HOME) to a folder that can be written and has room"
        ) from error
    if not len(tokens):
        raise UserError(f"the {name} data has no tokens: every row is empty")
    return tokens


def tokenizer_recipe(tokenizer: PreTrainedTokenizerFast, end_of_text: int | None) -> list:
    """What the tokens of a row depend on, as JSON takes it."""
    tokenizer("")  # a first call may change its settings, e.g. switch off a truncation, and so its serialisation
    return [
        [str(type(tokenizer)), tokenizer.backend_tokenizer.to_str(), tokenizer.split_special_tokens],
        [end_of_text, tokenizers.__version__],
    ]


def is_plain(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether its class leaves a fast tokenizer's call as it is: that does nothing to the ids of its Rust part, which
    then can be asked alone, without lists of masks and strings; and by two threads, which Python code may not bear."""
    # two of these names are private: in a transformers that has moved them no tokenizer is plain, which takes longer
    methods = ("__call__", "_encode_plus", "_convert_encoding")
    own = [getattr(type(tokenizer), name, None) for name in methods]
    return None not in own and own == [getattr(PreTrainedTokenizerFast, name, None) for name in methods]


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, end_of_text: int | None) -> np.ndarray:
    """The tokens of all texts, one after the other, as an array of int32; see `tokenize_rows`."""
    if end_of_text is not None:  # an empty row is no document: it has neither an end nor a token that begins it
        texts = [text for text in texts if text]
        if not texts:
            return np.empty(0, dtype=np.int32)
    if is_plain(tokenizer):
        rows = (encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts))
    else:
        rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    if end_of_text is not None:
        rows = (row if not row or row[-1] == end_of_text else [*row, end_of_text] for row in rows)
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32)


def _write_tokens(
    file: BinaryIO,
    rows: Rows,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    end_of_text: int | None,
    show_progress: bool,
) -> None:
    """Writes the tokens of all rows.

    The tokenizer's own threads work on one batch after the other; two threads here hand them over and make arrays of
    what comes back, while this one reads rows and writes arrays.
    """
    batches: deque[Future[np.ndarray]] = deque()
    bar = tqdm(total=len(rows), desc=f"tokenizing {name}", unit=" rows", disable=not show_progress, leave=False)
    with bar, ThreadPoolExecutor(1 + is_plain(tokenizer)) as threads:
        for texts in _batches(rows, name):
            batches.append(threads.submit(encode, texts, tokenizer, end_of_text))
            if len(batches) > NUM_BATCHES_AHEAD:
                file.write(batches.popleft().result().data)
            bar.update(len(texts))
        for batch in batches:
            file.write(batch.result().data)


def _batches(rows: Rows, name: str) -> Iterator[list[str]]:
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
