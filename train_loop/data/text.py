"""The text of a split's first tokens. Perplexities per word and per byte divide by its size."""

import hashlib
from dataclasses import dataclass

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from train_loop.data.row_files import Rows
from train_loop.data.tokens import encode, without_blank


@dataclass(frozen=True)
class CoveredText:
    """The size of the text that n tokens stand for, and which tokens stand for text.

    byte_ends [n]: bytes of the text up to the end of each token; the last is `num_bytes`. A token that ends within a
    character has all of its bytes. Text without a token (white space, in some tokenizers) belongs to the next token.
    digest: identifies the text of all rows, including those after the n tokens.
    words: separated by white space. line_ends: one per line, as WikiText counts, also for a row without a newline.
    bytes: of the text in UTF-8. is_text [n] of bool: False for the special tokens that a tokenizer puts around a row,
    and for the end-of-text token of `add_eos_token`. A special token that is written in the text, such as "<unk>",
    stands for these characters.
    """

    num_words: int
    num_line_ends: int
    num_bytes: int
    is_text: np.ndarray
    byte_ends: np.ndarray
    digest: str


def covered_text(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, end_of_text: int | None, num_tokens: int
) -> CoveredText:
    """The `CoveredText` of the first `num_tokens` tokens of `rows`, as `tokenize_rows` makes them.

    The rows are tokenised again, as far as needed, because offsets are needed here. A row that is cut counts up to the
    end of its last token. A word that is cut there counts as one word, and a character as all of its bytes.
    """
    num_words = num_line_ends = num_bytes = 0
    is_text, byte_ends, num_left = [np.zeros(0, dtype=bool)], [np.zeros(0, dtype=np.int64)], num_tokens
    digest, is_cut = hashlib.blake2b(digest_size=16), False
    for row in rows:
        text = str(without_blank(row["text"]))  # rows of text only (`load_split`)
        digest.update(text.encode() + b"\0")
        if is_cut:
            continue
        encoding = tokenizer(text, return_attention_mask=False, return_special_tokens_mask=True, verbose=False)
        num_own = len(encode([text], tokenizer, end_of_text))  # with an end-of-text token after the row
        of_row = np.zeros(num_own, dtype=bool)
        by_tokenizer = np.logical_not(encoding["special_tokens_mask"])[:num_own]
        of_row[: len(by_tokenizer)] = by_tokenizer
        is_text.append(of_row[:num_left])
        byte_ends.append(num_bytes + _byte_ends(text, encoding.encodings[0], of_row)[:num_left])
        is_cut = num_own > num_left
        if is_cut:
            covered = np.flatnonzero(of_row[:num_left])
            text = text[: encoding.token_to_chars(int(covered[-1])).end] if len(covered) else ""
        num_words += len(text.split())
        num_line_ends += text.count("\n") + (not is_cut and not text.endswith("\n"))
        num_bytes += len(text.encode())
        num_left -= num_own
    ends = np.concatenate(byte_ends)
    ends[-1:] = num_bytes  # with what follows the last token
    return CoveredText(num_words, num_line_ends, num_bytes, np.concatenate(is_text), ends, digest.hexdigest())


def _byte_ends(text: str, encoding: tokenizers.Encoding, is_text: np.ndarray) -> np.ndarray:
    """[n] int64: bytes of the row's `text` up to the end of each of its n tokens. `is_text`: of these tokens."""
    sizes = [0, *(len(character.encode()) for character in text)]
    characters = np.zeros(len(is_text), dtype=np.int64)
    ends = np.fromiter((end for _, end in encoding.offsets), np.int64)[: len(is_text)]
    characters[: len(ends)] = ends
    return np.cumsum(sizes)[np.maximum.accumulate(characters * is_text)]
