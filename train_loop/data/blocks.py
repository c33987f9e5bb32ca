"""Rows of text become equal blocks of tokens:

    1. rows      rows.py         a line of a file, a file of a folder, an entry of a data set
    2. tokens    tokens.py       each row as `tokenizer(row)` does, in order, in one int32 file on disk. On request
                                 the end-of-text token follows each row that is not empty. Tokens that are not
                                 targets carry marks (prompts.py, marks.py)
    3. blocks    group_texts     all tokens of the split, cut every `block_size`; the remainder is dropped
    4. order     block_order     which blocks an epoch takes, and in which order
    5. windows   Windows         one process's micro-batches of one optimizer step, in the epoch's order

B: blocks in a micro-batch, T: tokens in a block, M: micro-batches in a window.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from train_loop.data.columns import TEXT
from train_loop.data.marks import NOT_A_TARGET, ROW_BEGINS, has_mark, ids_of
from train_loop.data.prompts import PLAIN, Counts, Marking, documents_apart, marking_of
from train_loop.data.row_files import Rows
from train_loop.data.text import CoveredText, covered_text
from train_loop.data.tokens import tokenize_rows, too_few
from train_loop.errors import UserError, num_of, tell
from train_loop.position import Place
from train_loop.settings import Settings

COUNTED_AT_ONCE = 1000  # blocks
IGNORED = -100  # the label of a token that is not a target, as in torch's cross entropy


@dataclass(frozen=True)
class Window:
    """One process's data for one optimizer step, and the position in the data after it."""

    tensors: dict[str, torch.Tensor]  # {"input_ids", "labels", ...}, each [M, B, T]
    end: Place


class TrainingData(Protocol):
    """What the loop needs of its training data. `Split` (prepared) and `streaming.Stream` have it."""

    name: str
    blocks: np.ndarray  # [n, T]; of a stream only the first block, for trial passes
    documents_apart: bool  # attention and positions restart at each row in a block

    @property
    def num_blocks(self) -> int | None:
        """None if unknown."""

    def blocks_in_epoch(self, settings: Settings) -> int | None:
        """Number of blocks in the first epoch; None if unknown."""

    def windows(self, start: Place, settings: Settings, accelerator: Accelerator) -> Iterator[Window]:
        """This process's windows from `start` to the end of its epoch."""

    def identity(self) -> dict[str, Any]:
        """The training data's part of a checkpoint's identity."""

    def summary(self) -> str:
        """One line about the data; with several sources, one each."""


@dataclass
class Split:
    """The blocks of a split, [num_blocks, T] of int32 on disk, and what they were cut from."""

    name: str
    blocks: np.ndarray
    num_rows: int = 0
    num_tokens: int = 0  # of all rows
    num_dropped: int = 0  # unused tokens after the last block, if all blocks are used
    documents_apart: bool = False  # attention and positions restart at each row in a block
    tail: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))  # last tokens, for eval_stride
    text: CoveredText | None = None  # text of the tokens in blocks and tail, with named_perplexities
    marking: Marking = PLAIN  # of the tokens
    counts: Counts = field(default_factory=Counts)  # of marked rows

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_targets(self) -> int:
        """Target tokens of all blocks."""
        if self.marking == PLAIN:
            return self.num_blocks * (self.blocks.shape[1] - 1)
        return int(self.targets_of_blocks().sum())

    def targets_of_blocks(self) -> np.ndarray:
        """[num_blocks]: the target tokens of each block."""
        pieces = (self.blocks[i : i + COUNTED_AT_ONCE] for i in range(0, self.num_blocks, COUNTED_AT_ONCE))
        labels = (model_inputs(piece, self.documents_apart)["labels"] for piece in pieces)
        return np.concatenate([(of_piece[:, 1:] != IGNORED).sum(1) for of_piece in labels])

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The checked `block_order` of an epoch: the indices of its blocks, [n]. Raises ValueError if an index is not
        an integer, names no block, or is repeated."""
        order = np.asarray(block_order(self.blocks, seed, epoch))
        where = f"block_order (train_loop/data/blocks.py), epoch {epoch}"
        if order.ndim != 1 or order.dtype.kind not in "iu" or not len(order):
            raise ValueError(
                f"{where}: it must give the indices of blocks, but gave {order.dtype} of shape {order.shape}"
            )
        if order.min() < 0 or order.max() >= self.num_blocks:
            wrong = order[(order < 0) | (order >= self.num_blocks)][0]
            raise ValueError(f"{where}: it names block {wrong}, but there are blocks 0 to {self.num_blocks - 1}")
        counts = np.bincount(order)
        if counts.max() > 1:
            raise ValueError(
                f"{where}: it names block {counts.argmax()} {counts.max()} times, and {(counts > 1).sum()} blocks more "
                "than once. An epoch takes each block at most once"
            )
        return order

    def blocks_in_epoch(self, settings: Settings) -> int:
        return len(self.order(settings.seed, epoch=0))

    def windows(self, start: Place, settings: Settings, accelerator: Accelerator) -> Iterator[Window]:
        """This process's windows from `start` to the end of its epoch."""
        windows = Windows(
            self.blocks,
            self.order(settings.seed, start.epoch),
            settings.per_device_train_batch_size,
            settings.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
            documents_apart=self.documents_apart,
        )
        if start.per_epoch not in (None, len(windows)) and accelerator.is_main_process:
            tell(
                f"epoch {start.epoch + 1} has {len(windows):,} optimizer steps, the one before it {start.per_epoch:,}: "
                "the number of steps of the run was computed from the length of its first epoch"
            )
        loaded = load_windows(windows, first=start.window, pin_memory=accelerator.device.type == "cuda")
        for number, tensors in enumerate(loaded, start=start.window + 1):
            yield Window(tensors, end=Place(start.epoch, number, per_epoch=len(windows)))

    def digest(self) -> str:
        return hashlib.blake2b(np.ascontiguousarray(self.blocks).data, digest_size=16).hexdigest()

    def identity(self) -> dict[str, Any]:
        """The training data's part of a checkpoint's identity."""
        return {"training blocks": self.digest()}

    def summary(self) -> str:
        block_size = self.blocks.shape[1]
        num_blocks = self.num_tokens // block_size
        cut, rest = f"{num_of(num_blocks, 'block')} of {block_size}", f"; {num_of(self.num_dropped, 'token')} dropped"
        if self.num_blocks < num_blocks:
            cut, rest = f"the first {self.num_blocks:,} of {cut}", ""
        elif len(self.tail):
            rest = f" and {num_of(len(self.tail), 'token')}"
        if self.marking == PLAIN:
            return f"{num_of(self.num_rows, 'row')} -> {num_of(self.num_tokens, 'token')} -> {cut}{rest}"
        rows, tokens = num_of(self.num_rows, "row"), num_of(self.counts.num_tokens, "token")
        targets = self.targets_of_blocks()
        parts = [f"{rows} ({self.marking.kind}) -> {tokens} -> {cut} with {num_of(int(targets.sum()), 'target')}"]
        parts += [f"blocks without a target: {(targets == 0).sum():,}"] if not targets.all() else []
        parts += [rest.removeprefix("; ")] if rest and self.marking.row_length is None else []
        if self.marking.rows:
            num_within = int((~has_mark(self.blocks[:, 0], ROW_BEGINS)).sum())
            parts.append(f"blocks that begin within a row: {num_within:,}")
        return "; ".join(parts + self.counts.remarks(self.marking))


def load_split(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, name: str, settings: Settings, show_progress: bool = False
) -> Split:
    """`rows` as a `Split`. `name` is "training" or "validation"; with several sources or sets, their own name comes
    before it. Raises UserError if the tokens do not fill a block, or if the tokenizer lacks a requested end-of-text
    token."""
    end_of_text, marking = marking_of(tokenizer, rows.kind, settings)
    tokens, counts = tokenize_rows(rows, tokenizer, name, end_of_text, show_progress, marking)
    blocks, num_dropped = group_texts([tokens], settings.block_size)
    if not len(blocks):
        raise UserError(too_few(name, rows, len(tokens), settings))
    is_training = name.endswith("training")
    max_blocks = settings.max_train_samples if is_training else settings.max_eval_samples
    split = Split(name, blocks[:max_blocks], len(rows), len(tokens), num_dropped, marking=marking, counts=counts)
    split.documents_apart = documents_apart(rows.kind, settings)
    if marking != PLAIN and not split.num_targets:
        raise UserError(f"the blocks of the {name} data have no target: give a larger block_size")
    if split.num_blocks < len(blocks):
        split.num_dropped = 0
    elif not is_training and settings.eval_stride:
        split.tail, split.num_dropped = tokens[blocks.size :], 0
    if not is_training and settings.named_perplexities:
        if rows.kind != TEXT:
            raise UserError(f"named_perplexities needs rows of text, but the {name} data has rows of {rows.kind}")
        split.text = covered_text(rows, tokenizer, end_of_text, split.blocks.size + len(split.tail))
    return split


def group_texts(rows: Sequence[np.ndarray], block_size: int) -> tuple[np.ndarray, int]:
    """(blocks [n, block_size], number of tokens dropped). The rows' tokens are joined in order and cut every
    `block_size`. The tokens of a last, short block are dropped. A single array is not copied."""
    tokens = rows[0] if len(rows) == 1 else np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
    num_blocks = len(tokens) // block_size
    return tokens[: num_blocks * block_size].reshape(num_blocks, block_size), len(tokens) - num_blocks * block_size


def block_order(blocks: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order of the `blocks` [n, T] in an epoch: their indices, shuffled.

    It may leave blocks out, but must name none twice. It must be a pure function of its arguments: a resumed run calls
    it again. The first epoch's length sets the run's number of steps. With several sources, `blocks` are those of the
    epoch (mixture.py); np.asarray(blocks) reads them.
    """
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(blocks))


class Windows(torch.utils.data.Dataset):
    """This process's part of each optimizer step: item i is {"input_ids", "labels"}, each [M, B, T] of int64, and with
    `documents_apart` also {"position_ids"}.

    A window takes the next `world_size * M * B` blocks of `order`. A last, short window has only the micro-batches
    that its blocks need, padded with blocks without targets. So each block is seen once, and every process has the
    same number of micro-batches.

    `documents_apart`: positions restart at 0 at the first token of each row, and that token is not a target. Where
    positions do not rise by one, transformers' models build attention masks that separate documents.
    """

    def __init__(
        self,
        blocks: np.ndarray,
        order: np.ndarray,
        micro_batch_size: int,
        num_micro_batches: int,
        world_size: int = 1,
        rank: int = 0,
        documents_apart: bool = False,
    ) -> None:
        self.blocks, self.order, self.documents_apart = blocks, order, documents_apart
        # if the micro-batch is larger than the data, pad only as far as an even share per process needs
        self.micro_batch_size = min(micro_batch_size, -(-len(order) // world_size))
        self.world_size, self.rank = world_size, rank
        self.blocks_per_window = world_size * num_micro_batches * self.micro_batch_size

    def __len__(self) -> int:
        return -(-len(self.order) // self.blocks_per_window)

    def __getitem__(self, window: int) -> dict[str, torch.Tensor]:
        indices = self.order[window * self.blocks_per_window :][: self.blocks_per_window]
        num_fillers = -len(indices) % (self.world_size * self.micro_batch_size)
        indices = np.concatenate([indices, np.full(num_fillers, -1)])
        indices = indices.reshape(-1, self.world_size, self.micro_batch_size)[:, self.rank]
        tensors = model_inputs(self.blocks[indices], self.documents_apart)
        tensors["labels"][indices == -1] = IGNORED
        return {name: torch.from_numpy(array) for name, array in tensors.items()}


def model_inputs(tokens: np.ndarray, documents_apart: bool) -> dict[str, np.ndarray]:
    """{"input_ids", "labels"}, each [..., T] of int64, from blocks of `tokens` [..., T]. With `documents_apart` also
    {"position_ids"}, and the first token of a document is not a target."""
    inputs = inputs_and_labels(tokens)
    if documents_apart:
        inputs["position_ids"] = positions_in_documents(tokens)
        inputs["labels"][inputs["position_ids"] == 0] = IGNORED
    return inputs


def inputs_and_labels(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """{"input_ids", "labels"}, each [..., T] of int64, of blocks of `tokens` [..., T], in training and evaluation.

    A token without NOT_A_TARGET (marks.py) is a target: its label is its id. The loss does the shift to the next token.
    A token whose label is -100 is not a target. Put a mask of your own here.
    """
    ids = ids_of(tokens)
    return {"input_ids": ids, "labels": np.where(has_mark(tokens, NOT_A_TARGET), IGNORED, ids)}


def positions_in_documents(tokens: np.ndarray) -> np.ndarray:
    """The position [..., T] of each token in its row. The first row counts from the block's beginning."""
    index = np.arange(tokens.shape[-1])
    return index - np.maximum.accumulate(np.where(has_mark(tokens, ROW_BEGINS), index, 0), axis=-1)


def load_windows(windows: Windows, first: int = 0, pin_memory: bool = False) -> torch.utils.data.DataLoader:
    """A DataLoader over `windows`, starting at index `first`. It has its own generator: otherwise iterating would draw
    from torch's global generator, and evaluation would change training."""
    return torch.utils.data.DataLoader(
        windows,
        batch_size=None,
        sampler=range(first, len(windows)),
        generator=torch.Generator(),
        pin_memory=pin_memory,
    )
