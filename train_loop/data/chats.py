"""The tokenizer's chat template turns chats into tokens. This file finds which of them the assistant wrote.

A template may mark them with {% generation %} and {% endgeneration %}. With any other template, each assistant turn is
found by difference. The chat is also rendered once up to the turn (with the generation prompt) and once up to the
turn's end. Both texts must be prefixes of the complete chat's text. The turn is what lies between them, including the
token that ends it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from train_loop.data.columns import Messages
from train_loop.errors import UserError, one_line

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


class RowProblem(UserError):
    """A problem with one of several rows; `index` is the row's, from 0."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The template that is used for chats. Raises UserError if there is none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            "the rows are chats, and the tokenizer has no chat template. Give a tokenizer that has one (tokenizer_name)"
            ", or put the template into its folder as chat_template.jinja"
        ) from error


def rendered(
    chats: Sequence[Messages], numbers: Sequence[int], tokenizer: PreTrainedTokenizerFast, **options: Any
) -> list[str]:
    """The text of each chat. `numbers`: the row index of each chat. Raises `RowProblem` with that index if the template
    refuses a chat."""
    chat_template(tokenizer)
    texts = []
    for chat, number in zip(chats, numbers, strict=True):
        try:
            texts.append(str(tokenizer.apply_chat_template(chat, tokenize=False, **options)))
        except TemplateError as error:
            raise RowProblem(number, f"the chat template refuses it: {one_line(error)}") from error
    return texts


def assistants_tokens(
    chats: list[Messages], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], np.ndarray]]:
    """(ids, which of them the assistant wrote) of each chat. Raises RowProblem if that is unclear."""
    if GENERATION.search(chat_template(tokenizer)):
        yield from _as_marked(chats, tokenizer)
        return
    texts = rendered(chats, range(len(chats)), tokenizer)
    turns = _turns(chats, texts, tokenizer)
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    assert batch.encodings is not None  # of a fast tokenizer
    for number, (text, encoding) in enumerate(zip(texts, batch.encodings, strict=True)):
        begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        is_target = np.zeros(len(begins), dtype=bool)
        for before, after in turns[number]:
            if not (text.startswith(after) and after.startswith(before)):
                raise RowProblem(
                    number,
                    "the chat template writes the beginning of this chat differently when it stands alone, so the "
                    "assistant's turns cannot be found. Put {% generation %} and {% endgeneration %} around them in "
                    "the template, or give --completion_only_loss false",
                )
            is_target |= (ends > len(before)) & (begins < len(after))
        yield batch["input_ids"][number], is_target


def _as_marked(chats: list[Messages], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], np.ndarray]]:
    """(ids, which of them the template marks as the assistant's) of each chat."""
    try:
        found: Any = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
    except TemplateError:
        rendered(chats, range(len(chats)), tokenizer)  # names the chat
        raise
    for number, (ids, mask) in enumerate(zip(found["input_ids"], found["assistant_masks"], strict=True)):
        is_target = np.array(mask, dtype=bool)
        if not is_target.any():
            raise RowProblem(number, "the chat template marks nothing in it as the assistant's")
        yield ids, is_target


def _turns(chats: list[Messages], texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[tuple[str, str]]]:
    """For each assistant turn of each chat: (the text before the turn, the text up to its end). `texts`: of the
    complete chats."""
    numbers, befores, afters = [], [], []
    for number, chat in enumerate(chats):
        for i, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise RowProblem(
                    number,
                    "its first message is the assistant's: a chat template with {% generation %} is needed",
                )
            numbers.append(number)
            befores.append(chat[:i])
            afters.append(chat[: i + 1])
    found: list[list[tuple[str, str]]] = [[] for _ in chats]
    before_texts = rendered(befores, numbers, tokenizer, add_generation_prompt=True)
    inner = [i for i, number in enumerate(numbers) if len(afters[i]) < len(chats[number])]
    inner_texts = rendered([afters[i] for i in inner], [numbers[i] for i in inner], tokenizer)
    after_texts = dict(zip(inner, inner_texts, strict=True))
    for i, (number, before) in enumerate(zip(numbers, before_texts, strict=True)):
        found[number].append((before, after_texts.get(i, texts[number])))  # the last turn ends the chat
    return found
