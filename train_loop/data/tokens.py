"""Rows of text become tokens, in one file of int32 on disk that later runs reuse.

Each row of text is tokenised as `tokenizer(row)` does, in order. On request the end-of-text token follows each row, and
empty rows then have no tokens. Rows whose tokens carry marks go through prompts.py.
"""

import errno
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from train_loop.data import token_cache
from train_loop.data.chats import RowProblem
from train_loop.data.columns import TEXT, Row, num_characters
from train_loop.data.prompts import PLAIN, Counts, Marking, encode_marked
from train_loop.data.row_files import Rows, digest_of
from train_loop.data.token_ids import is_plain, token_ids
from train_loop.errors import UserError
from train_loop.settings import Settings

# a batch for the tokenizer ends when it reaches either; neither has an effect on the tokens
ROWS_PER_BATCH, CHARACTERS_PER_BATCH = 10_000, 1 << 19
TOKENS_PER_BATCH = 1 << 20  # of padded rows
NUM_BATCHES_AHEAD = 3  # in work or waiting, so that the tokenizer's threads never wait for Python's
# the code that turns files into tokens: any change to it makes new tokens
CODE_FILES = (
    *("chats", "columns", "formats", "json_files", "marks", "prompts", "row_files", "tables", "text_files"),
    *("token_ids", "tokens"),
)
CODE = digest_of([Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in CODE_FILES])
# of a cache that is full or not writable
CACHE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
)


def too_few(name: str, rows: Rows, num_tokens: int, settings: Settings) -> str:
    """The message for rows that do not fill one block. Rows that do not begin at the data's first are held out."""
    size = f"{len(rows):,} row{'s' if len(rows) != 1 else ''} of {num_tokens:,} tokens together"
    ways = f"give a block_size of at most {num_tokens}, or more text"
    if rows.span.start:
        ways = (
            f"give a validation_split_percentage above {settings.validation_split_percentage}, a validation_file, or "
        )
        ways += f"a block_size of at most {num_tokens}"
    return f"the {name} data has {size}, less than one block of {settings.block_size}: {ways}"


def no_target_left(name: str, marking: Marking) -> str:
    """The message if every row is left out, because its targets come after its first block."""
    return f"no row of the {name} data has a target in its first {marking.row_length} tokens: give a larger block_size"


def tokenize_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    end_of_text: int | None = None,
    show_progress: bool = False,
    marking: Marking = PLAIN,
) -> tuple[np.ndarray, Counts]:
    """(the tokens of all rows in order: a read-only, memory-mapped array [tokens] of int32; counts of marked rows).
    `end_of_text` is the id of the token to put after each row that is not empty, or None.

    The tokens are cached beside the cache of `datasets`. The file's name is a digest of the rows, the tokenizer and the
    code. A file is verified when it is opened; a damaged one is made again. Raises UserError for a row that is null or
    that the chat template refuses, and if the cache cannot be written.
    """
    span = [rows.span.start, rows.span.stop]
    key = digest_of([rows.digest, span, *tokenizer_recipe(tokenizer, end_of_text, marking), CODE])

    def write(file: BinaryIO) -> None:
        _write_tokens(file, rows, tokenizer, name, end_of_text, show_progress, marking)

    try:
        tokens = token_cache.open_or_make(key, write)
    except OSError as error:
        if error.errno not in CACHE_ERRORS:
            raise
        raise UserError(
            f"the tokens of the {name} data cannot be written to {token_cache.token_folder()}: {error.strerror}. Set "
            "HF_DATASETS_CACHE (or HF_HOME) to a folder that can be written and has room"
        ) from error
    counts = Counts(len(tokens))
    if marking != PLAIN:
        tokens, counts = Counts.split_off(tokens)
    if not len(tokens):
        raise UserError(
            f"the {name} data has no tokens: every row is empty"
            if not counts.num_left_out
            else no_target_left(name, marking)
        )
    return tokens, counts


def tokenizer_recipe(tokenizer: PreTrainedTokenizerFast, end_of_text: int | None, marking: Marking = PLAIN) -> list:
    """What the tokens of a row depend on, as JSON values."""
    tokenizer("")  # a first call may change its settings, e.g. switch off a truncation, and so its serialisation
    recipe: list = [
        [str(type(tokenizer)), tokenizer.backend_tokenizer.to_str(), tokenizer.split_special_tokens],
        [end_of_text, tokenizers.__version__],
    ]
    if marking != PLAIN:
        recipe.append(asdict(marking))
    if marking.kind != TEXT:  # chats, or prompts that may be
        template = tokenizer.chat_template
        recipe += [template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
        recipe += [transformers.__version__]  # it renders chats
    return recipe


def encode(texts: list[Any], tokenizer: PreTrainedTokenizerFast, end_of_text: int | None) -> np.ndarray:
    """The tokens of all texts, one after the other, as an array of int32; see `tokenize_rows`."""
    if end_of_text is not None:  # an empty row is not a document: it gets no end and no begin token
        texts = [text for text in texts if text]
        if not texts:
            return np.empty(0, dtype=np.int32)
    rows = token_ids(texts, tokenizer)
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
    marking: Marking,
) -> None:
    """Writes the tokens of all rows, and the counts of marked ones.

    The tokenizer's own threads work on one batch at a time. One or two threads here submit the batches and turn the
    results into arrays. The calling thread reads rows and writes arrays.
    """
    batches: deque[Future[tuple[np.ndarray, Counts]]] = deque()
    counts, num_rows = Counts(), 0

    def tokenize(rows: list[Row], number: int) -> tuple[np.ndarray, Counts]:
        """`number`: of rows before `rows`."""
        if marking == PLAIN:
            return encode(rows, tokenizer, end_of_text), Counts()
        try:
            return encode_marked(rows, tokenizer, end_of_text, marking)
        except RowProblem as problem:
            raise UserError(f"row {number + problem.index + 1:,} of the {name} data: {problem}") from problem

    def write(batch: Future[tuple[np.ndarray, Counts]]) -> None:
        tokens, of_batch = batch.result()
        file.write(tokens.data)
        counts.add(of_batch)

    bar = tqdm(total=len(rows), desc=f"tokenizing {name}", unit=" rows", disable=not show_progress, leave=False)
    with bar, ThreadPoolExecutor(1 + (is_plain(tokenizer) and marking == PLAIN)) as threads:
        for some in _batches(rows, name, marking):
            batches.append(threads.submit(tokenize, some, num_rows))
            num_rows += len(some)
            if len(batches) > NUM_BATCHES_AHEAD:
                write(batches.popleft())
            bar.update(len(some))
        for batch in batches:
            write(batch)
    if marking != PLAIN:
        file.write(counts.to_array().data)


def _batches(rows: Rows, name: str, marking: Marking) -> Iterator[list[Row]]:
    """The rows in batches."""
    batch: list[Row] = []
    length, most = 0, ROWS_PER_BATCH if marking.row_length is None else max(1, TOKENS_PER_BATCH // marking.row_length)
    for number, row in enumerate(rows, start=1):
        if row["text"] is None:
            raise UserError(f"row {number} of the {name} data is null")
        batch.append(without_blank(row["text"]))
        length += num_characters(batch[-1])
        if len(batch) >= most or length >= CHARACTERS_PER_BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def without_blank(row: Row) -> Row:
    """The row; a text of white space alone becomes empty, as in the hub's WikiText."""
    return "" if isinstance(row, str) and row.isspace() else row
