"""Marks on tokens: what is known of a token beside its id stands in high bits of its int32.

Cutting, shuffling, streaming, caching and digests carry the marks along with the tokens, and need no code for it. Ids
are below 2 ** 24. Tokens of plain rows of text have no marks: they are their ids.
"""

import numpy as np

NOT_A_TARGET = 1 << 30  # the label of this token is -100: a prompt, or what fills up a block
ROW_BEGINS = 1 << 29  # this token is the first of its row: where rows are kept apart, positions restart here
ID = (1 << 24) - 1  # the bits of the id


def ids_of(tokens: np.ndarray) -> np.ndarray:
    """The ids of tokens, without their marks, of int64."""
    return (tokens & ID).astype(np.int64)


def has_mark(tokens: np.ndarray, mark: int) -> np.ndarray:
    """Which of the tokens have a mark, as bool."""
    return (tokens & mark) != 0
