"""Marks on tokens: facts about a token, beside its id, in the high bits of its int32.

Cutting, shuffling, streaming, caching and digests keep the marks and need no extra code. Ids are below 2 ** 24. Tokens
of plain text rows have no marks: they equal their ids.
"""

import numpy as np

NOT_A_TARGET = 1 << 30  # the label of this token is -100: a prompt, or padding
ROW_BEGINS = 1 << 29  # this token is the first of its row; with documents apart, positions restart here
ID = (1 << 24) - 1  # the bits of the id


def ids_of(tokens: np.ndarray) -> np.ndarray:
    """The ids of tokens, without their marks, of int64."""
    return (tokens & ID).astype(np.int64)


def has_mark(tokens: np.ndarray, mark: int) -> np.ndarray:
    """Which of the tokens have a mark, as bool."""
    return (tokens & mark) != 0
