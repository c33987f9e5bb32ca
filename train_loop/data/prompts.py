"""Rows whose tokens carry marks (`marks.py`): prompts and completions, chats, and rows that are kept apart.

A prompt is tokenised twice: alone, and with its completion and the end-of-text token. The completion begins at the
first token that differs, as in TRL's SFTTrainer. If that is before the prompt's end, the model sees different prompt
tokens in generation than in training. Such rows are counted. chats.py finds what the assistant wrote in a chat.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from train_loop.data.chats import assistants_tokens, rendered
from train_loop.data.columns import CHAT, PROMPT, TEXT
from train_loop.data.marks import NOT_A_TARGET, ROW_BEGINS, has_mark
from train_loop.data.token_ids import token_ids
from train_loop.errors import UserError, num_of
from train_loop.settings import Settings


@dataclass(frozen=True)
class Marking:
    """Which marks the tokens of rows get."""

    kind: str = TEXT
    completion_only: bool = False  # only completions, and what the assistant wrote, are targets
    rows: bool = False  # the first token of each row is marked
    row_length: int | None = None  # each row is cut or padded to this many tokens
    filler: int = 0  # the id for padding


PLAIN = Marking()


@dataclass
class Counts:
    """How many rows of a split were cut, merged or left out. This cannot be seen from the tokens that are kept."""

    num_tokens: int = 0  # of the rows, without padding
    num_cut: int = 0  # rows that are longer than `row_length`
    num_lost: int = 0  # tokens cut from them
    num_left_out: int = 0  # rows without a target in their first `row_length` tokens
    num_merged: int = 0  # rows whose tokens do not begin with their prompt's tokens

    def add(self, other: "Counts") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def to_array(self) -> np.ndarray:
        """As int32, to be written after the tokens."""
        return np.array([getattr(self, field.name) for field in fields(self)], dtype=np.int64).view(np.int32)

    def remarks(self, marking: Marking) -> list[str]:
        """Clauses about rows that do not fit."""
        found, length = [], marking.row_length
        if length:
            found.append("each row has a block of its own")
        if self.num_cut:
            found.append(f"longer rows, which are cut: {self.num_cut:,}, by {num_of(self.num_lost, 'token')}")
        if self.num_left_out:
            found.append(f"rows left out, without a target in their first {length:,} tokens: {self.num_left_out:,}")
        if self.num_merged:
            found.append(
                f"prompts that end within a token: {self.num_merged:,}; move white space from their end to the "
                "completion's beginning"
            )
        return found

    @classmethod
    def split_off(cls, tokens: np.ndarray) -> tuple[np.ndarray, "Counts"]:
        """(tokens, counts) from an array that ends with `to_array()`."""
        size = 2 * len(fields(cls))
        return tokens[:-size], cls(*np.array(tokens[-size:]).view(np.int64).tolist())


def marking_of(tokenizer: PreTrainedTokenizerFast, kind: str, settings: Settings) -> tuple[int | None, Marking]:
    """(the id of the token that ends each row, or None; the marks of rows of this kind). Raises UserError if the
    tokenizer lacks the token, or if the settings do not fit the kind."""
    if kind == CHAT and settings.add_eos_token:
        raise UserError("add_eos_token is for rows of text: a chat ends as the chat template ends it")
    if kind == TEXT and settings.document_attention and not settings.add_eos_token:
        raise UserError("document_attention goes with add_eos_token, which marks where documents end")
    if settings.add_eos_token and tokenizer.eos_token_id is None:
        raise UserError("add_eos_token: the tokenizer has no end-of-text token")
    end_of_text = tokenizer.eos_token_id if settings.add_eos_token or kind == PROMPT else None
    marks_rows = settings.packing and (kind != TEXT or bool(settings.document_attention))
    marking = Marking(kind, settings.completion_only_loss and kind != TEXT, marks_rows)
    if not settings.packing:
        fillers = (tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
        filler = next(token for token in fillers if token is not None)
        marking = replace(marking, row_length=settings.block_size, filler=filler)
    return end_of_text, marking


def documents_apart(kind: str, settings: Settings) -> bool:
    """Whether rows of a kind are separated within a block. False if each row has a block of its own."""
    asked = settings.document_attention
    return settings.packing and (kind != TEXT if asked is None else asked)


def encode_marked(
    rows: list[Any], tokenizer: PreTrainedTokenizerFast, end_of_text: int | None, marking: Marking
) -> tuple[np.ndarray, Counts]:
    """(the tokens of all rows in order, with their marks, as int32; counts).

    Raises `RowProblem` for a row that the chat template refuses.
    """
    counts = Counts()
    encoded: Iterable[tuple[list[int], Any]]  # per row: its ids, and which are targets (a slice or an array)
    if marking.kind == CHAT and marking.completion_only:
        encoded = assistants_tokens(rows, tokenizer)
    elif marking.kind == CHAT:
        texts = rendered(rows, range(len(rows)), tokenizer)
        encoded = ((ids, slice(None)) for ids in token_ids(texts, tokenizer, add_special_tokens=False))
    elif marking.kind == PROMPT:
        encoded = _completions(rows, tokenizer, end_of_text, counts)
    else:
        texts = [row for row in rows if row]
        encoded = ((_ended(ids, end_of_text), slice(None)) for ids in token_ids(texts, tokenizer))
    found = []
    for ids, targets in encoded:
        if not ids:
            continue
        tokens = np.array(ids, dtype=np.int32)
        if marking.completion_only:
            tokens |= NOT_A_TARGET
            tokens[targets] &= ~NOT_A_TARGET
        if marking.rows:
            tokens[0] |= ROW_BEGINS
        if marking.row_length:
            tokens = _in_a_block(tokens, marking, counts)
        else:
            counts.num_tokens += len(tokens)
        found.append(tokens)
    return np.concatenate(found, dtype=np.int32) if found else np.empty(0, dtype=np.int32), counts


def _ended(ids: list[int], end_of_text: int | None) -> list[int]:
    return ids if end_of_text is None or not ids or ids[-1] == end_of_text else [*ids, end_of_text]


def _completions(
    rows: list[tuple[Any, Any]], tokenizer: PreTrainedTokenizerFast, end_of_text: int | None, counts: Counts
) -> Iterator[tuple[list[int], slice]]:
    """(ids, slice of the completion) of each row."""
    alone: dict[int, list[int]] = {}  # of the prompt, by the row's index
    whole: dict[int, list[int]] = {}
    texts = [i for i, (prompt, _) in enumerate(rows) if isinstance(prompt, str)]
    if texts and end_of_text is None:
        raise UserError(
            "a completion ends with the end-of-text token, and the tokenizer has none: give one that has it"
        )
    if texts:
        prompts, both = [rows[i][0] for i in texts], [rows[i][0] + rows[i][1] for i in texts]
        alone |= zip(texts, token_ids(prompts, tokenizer), strict=True)
        whole |= zip(texts, (_ended(ids, end_of_text) for ids in token_ids(both, tokenizer)), strict=True)
    chats = [i for i, (prompt, _) in enumerate(rows) if isinstance(prompt, list)]
    if chats:
        prompts = rendered([rows[i][0] for i in chats], chats, tokenizer, add_generation_prompt=True)
        both = rendered([rows[i][0] + rows[i][1] for i in chats], chats, tokenizer)
        alone |= zip(chats, token_ids(prompts, tokenizer, add_special_tokens=False), strict=True)
        whole |= zip(chats, token_ids(both, tokenizer, add_special_tokens=False), strict=True)
    for i in range(len(rows)):
        first = len(alone[i])  # token of the completion
        if whole[i][:first] != alone[i]:
            counts.num_merged += 1
            first = next(n for n in range(first) if whole[i][n : n + 1] != alone[i][n : n + 1])
        yield whole[i], slice(first, None)


def _in_a_block(tokens: np.ndarray, marking: Marking, counts: Counts) -> np.ndarray:
    """The tokens of a row, cut or padded to `row_length`; empty if no target is left."""
    length = marking.row_length
    assert length is not None
    kept = tokens[:length]
    if has_mark(kept[1:], NOT_A_TARGET).all():
        counts.num_left_out += 1
        return kept[:0]
    counts.num_tokens += len(kept)
    counts.num_cut += len(kept) < len(tokens)
    counts.num_lost += len(tokens) - len(kept)
    return np.pad(kept, (0, length - len(kept)), constant_values=marking.filler | NOT_A_TARGET)
