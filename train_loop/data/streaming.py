"""Blocks of tokens from a source that is never completely in memory or on disk (`--streaming`).

    1. chunks    sources.py           whole rows, about half a megabyte of them, and the place where they begin
    2. tokens    Stream._tokens       each of W processes tokenises every W-th chunk, in a thread beside the training;
                                      then they exchange the tokens, so that each has all of them
    3. blocks    cut_blocks           the tokens cut every T; the remainder is joined to the next chunk's tokens, and
                                      dropped at the epoch's end
    4. order     shuffle_in_groups    each group of `shuffle_buffer_size` blocks, shuffled by (seed, epoch, number of
                                      the group)
    5. windows   Stream.windows       the micro-batches of an optimizer step, as from prepared blocks

W and the size of a chunk have no effect on the blocks or their order. Without shuffling, the blocks are those of
`blocks.group_texts`. `Place.stream` saves where a window ends: the place of the chunk in which the group's first block
begins, the token in that chunk, the number of the group, and how many of its blocks are done. To resume, the source
starts at that place, and at most two groups are tokenised again.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerFast

from train_loop.data.blocks import Window, Windows
from train_loop.data.chats import RowProblem
from train_loop.data.columns import TEXT, Row
from train_loop.data.prompts import PLAIN, documents_apart, encode_marked, marking_of
from train_loop.data.row_files import digest_of
from train_loop.data.sources import Source
from train_loop.data.tokens import encode, no_target_left, tokenizer_recipe, without_blank
from train_loop.errors import UserError, tell
from train_loop.position import Place
from train_loop.settings import Settings

Block = tuple[np.ndarray, tuple[Any, int]]  # its tokens, and where the first of them is: (place of its chunk, token)
Shuffled = tuple[np.ndarray, tuple[Any, int], int, int]  # see `shuffle_in_groups`

NUM_ROUNDS_AHEAD = 3  # chunks that each process tokenises ahead of the training
BEGINNING: dict[str, Any] = {"place": None, "token": 0, "group": 0, "index": 0}


def cut_blocks(chunks: Iterable[tuple[Any, np.ndarray]], token: int, block_size: int) -> Iterator[Block]:
    """Yields (block [T] of int32, (place, token) of its first token). `chunks`: (place, tokens) of each chunk; their
    first `token` tokens are skipped. The tokens of a last, short block are dropped."""
    rest, beginning = np.empty(0, dtype=np.int32), (None, 0)
    for place, tokens in chunks:
        start = token - len(rest)  # index in the chunk of `tokens[0]` below
        tokens, token = np.concatenate([rest, tokens[token:]]), max(0, token - len(tokens))
        for i in range(0, len(tokens) - block_size + 1, block_size):
            yield tokens[i : i + block_size], beginning if i < len(rest) else (place, start + i)
        i = len(tokens) // block_size * block_size
        rest, beginning = tokens[i:], beginning if i < len(rest) else (place, start + i)


def shuffle_in_groups(blocks: Iterator[Block], size: int, seed: int, epoch: int, group: int = 0) -> Iterator[Shuffled]:
    """Yields (block, beginning of its group's first block, number of the group, its blocks so far). Each group of
    `size` blocks has its own order, a pure function of (seed, epoch, group).

    For each block that leaves, one of the next group is read, so reading has an even pace. 2 x `size` blocks are in
    memory.
    """
    current = list(itertools.islice(blocks, size))
    while current:
        upcoming: list[Block] = []
        order = np.zeros(1, dtype=int)
        if size > 1:
            order = np.random.Generator(np.random.PCG64([seed, epoch, group])).permutation(len(current))
        for index, i in enumerate(order, start=1):
            upcoming += itertools.islice(blocks, 1)
            yield current[i][0], current[0][1], group, index
        current, group = upcoming, group + 1


class Stream:
    """A source's training blocks, in unknown number: a `blocks.TrainingData`."""

    name = "training"
    num_blocks: int | None = None

    def __init__(
        self, source: Source, tokenizer: PreTrainedTokenizerFast, settings: Settings, name: str = "training"
    ) -> None:
        """`name`: of the data, in messages. Raises UserError if it fills no block."""
        self.source, self.tokenizer, self.settings = source, tokenizer, settings
        kind, names = source.columns.kind, source.columns.names
        self.end_of_text, self.marking = marking_of(tokenizer, kind, settings)
        self.documents_apart = documents_apart(kind, settings)
        self.tells_of_cuts = self.tells_of_merged = True
        self.num_left_out = 0  # rows that this process tokenised, without a target in their block
        recipe = tokenizer_recipe(tokenizer, self.end_of_text, self.marking)
        recipe += [settings.block_size, settings.max_train_samples, names[0] if len(names) == 1 else names]
        self._identity = {
            "training blocks": f"streamed, {digest_of(recipe)}",
            "shuffle_buffer_size": settings.shuffle_buffer_size,
            **source.files.identity(),
        }
        for block, _ in cut_blocks(self._tokens(None), 0, settings.block_size):
            self.blocks = block[None]  # [1, T], for trial passes
            break
        else:
            if self.num_left_out:
                raise UserError(no_target_left(name, self.marking))
            raise UserError(f"the {name} data has less than one block of {settings.block_size} tokens")

    def identity(self) -> dict[str, Any]:
        return self._identity

    def summary(self) -> str:
        size = self.settings.shuffle_buffer_size
        order = f"shuffled in groups of {size:,}" if size > 1 else "in the order of the data"
        rows = f" (rows of {self.marking.kind})" if self.marking.kind != TEXT else ""
        return f"streamed from {self.source.files.summary()}{rows}; blocks of {self.settings.block_size} {order}"

    def blocks_in_epoch(self, settings: Settings) -> int | None:
        """Not known before the end of the data."""
        return None

    def windows(self, start: Place, settings: Settings, accelerator: Accelerator) -> Iterator[Window]:
        """This process's windows from `start` to the end of its epoch. The last one knows their number.

        Raises UserError on all processes if one of them cannot read the data.
        """
        if start.window and start.window == start.per_epoch:
            return
        W, rank = accelerator.num_processes, accelerator.process_index
        shape = settings.per_device_train_batch_size, settings.gradient_accumulation_steps, W, rank
        per_window = math.prod(shape[:3])
        blocks = self.blocks_from(start, settings, W, rank)
        window = list(itertools.islice(blocks, per_window))
        if not window:
            raise UserError(
                "the training data ends before the place from which the run would resume: it became shorter. Restore "
                "the data, or start a new run"
            )
        for number in itertools.count(start.window + 1):
            following = list(itertools.islice(blocks, per_window))  # read ahead, to know which is the last
            end = Place(start.epoch, number, start.per_epoch if following else number, window[-1][1])
            taken = np.stack([block for block, _ in window])
            batch = Windows(taken, np.arange(len(taken)), *shape, documents_apart=self.documents_apart)[0]
            if accelerator.device.type == "cuda":
                batch = {name: value.pin_memory() for name, value in batch.items()}
            yield Window(batch, end)
            if not following:
                return
            window = following

    def blocks_from(self, start: Place, settings: Settings, W: int, rank: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Yields (block, `Place.stream` after it) for each block from `start` to the end of its epoch."""
        at = start.stream if start.window and start.stream else BEGINNING
        return self.blocks_at(at, settings.seed, start.epoch, W, rank)

    def blocks_at(
        self, at: dict[str, Any], seed: int, epoch: int, W: int, rank: int
    ) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yields (block, place after it) from the place `at` (see BEGINNING) to the end of the data."""
        settings, size = self.settings, max(1, self.settings.shuffle_buffer_size)
        blocks = cut_blocks(self._tokens(at["place"], W, rank), at["token"], settings.block_size)
        if settings.max_train_samples:
            blocks = itertools.islice(blocks, settings.max_train_samples - at["group"] * size)
        shuffled = shuffle_in_groups(blocks, size, seed, epoch, at["group"])
        for block, (place, token), group, index in itertools.islice(shuffled, at["index"], None):
            yield block, {"place": place, "token": token, "group": group, "index": index}

    def _encode(self, rows: list[Row], place: Any) -> np.ndarray:
        """The tokens of a chunk's rows, with their marks."""
        if self.marking == PLAIN:
            return encode(rows, self.tokenizer, self.end_of_text)
        are_chats = self.marking.kind != TEXT and rows and not isinstance(rows[0][0], str)
        if are_chats and "strftime_now" in str(self.tokenizer.chat_template or ""):
            raise UserError(
                "the chat template writes today's date into each row: a run that is resumed on another day would read "
                "other tokens. Prepare the data (streaming false), or write a fixed date into the template"
            )
        try:
            tokens, counts = encode_marked(rows, self.tokenizer, self.end_of_text, self.marking)
        except RowProblem as problem:
            where = f"row {problem.index + 1:,} of the training data after {place or 'its beginning'}"
            raise UserError(f"{where}: {problem}") from problem
        self.num_left_out += counts.num_left_out
        if (counts.num_cut or counts.num_left_out) and self.tells_of_cuts:
            self.tells_of_cuts = False  # once: their number is unknown until the data ends
            tell(
                f"note: rows of the training data are longer than block_size {self.settings.block_size}: they are cut, "
                "and left out where no target is left"
            )
        if counts.num_merged and self.tells_of_merged:
            self.tells_of_merged = False
            tell(
                "note: prompts of the training data end within a token: move white space from their end to the "
                "completion's beginning"
            )
        return tokens

    def _tokens(self, place: Any, W: int = 1, rank: int = 0) -> Iterator[tuple[Any, np.ndarray]]:
        """Yields (place, tokens) of each chunk from a place on, the same on all W processes."""
        chunks = self.source.chunks(place)

        def tokenize() -> tuple[list, np.ndarray | None, Exception | None]:
            """Of the next W chunks: their places, the tokens of this process's chunk, the error."""
            places, tokens = [], None
            try:
                for i, (place, chunk) in enumerate(itertools.islice(chunks, W)):
                    places.append(place)
                    if i == rank:
                        tokens = self._encode([without_blank(row) for row in self.source.texts(place, chunk)], place)
            except Exception as error:  # any error: the other processes wait for this one
                return places, tokens, error
            return places, tokens, None

        thread = ThreadPoolExecutor(1)  # one keeps the rounds in order; the tokenizer has its own threads
        try:
            rounds = deque(thread.submit(tokenize) for _ in range(NUM_ROUNDS_AHEAD))
            while True:
                places, tokens, error = rounds.popleft().result()
                rounds.append(thread.submit(tokenize))
                results = gather_object([(tokens, error and str(error))]) if W > 1 else [(tokens, None)]
                if error is not None:
                    raise error
                for _, problem in results:
                    if problem:
                        raise UserError(problem)
                if not places:
                    return
                yield from zip(places, (tokens for tokens, _ in results), strict=False)
        finally:
            thread.shutdown(cancel_futures=True)
