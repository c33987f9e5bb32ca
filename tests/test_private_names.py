"""Private names of other libraries: where a version has moved one, the work takes longer and gives the same."""

import datasets
import numpy as np
import pytest

from train_loop.data import row_files, token_ids, tokens
from train_loop.data.row_files import Rows
from train_loop.model import load_tokenizer
from train_loop.settings import Settings

TEXTS = ["one two three", "", "four five", "six"]


def test_a_tokenizer_without_the_private_methods_gives_the_same_tokens(monkeypatch):
    tokenizer = load_tokenizer(Settings(tokenizer_vocab_size=300), Rows.of(TEXTS))
    assert token_ids.is_plain(tokenizer)
    fast = tokens.encode(TEXTS, tokenizer, None)
    monkeypatch.setattr(token_ids, "PreTrainedTokenizerFast", type("Moved", (), {}))
    assert not token_ids.is_plain(tokenizer)
    assert len(fast) and np.array_equal(tokens.encode(TEXTS, tokenizer, None), fast)


class WithoutFingerprint:
    """A `datasets.Dataset` whose private name for its content is gone."""

    def __init__(self, rows):
        self.rows = rows

    def __getattr__(self, name):
        if name == "_fingerprint":
            raise AttributeError(name)
        return getattr(self.rows, name)

    def __len__(self):
        return len(self.rows)

    def select_columns(self, names):
        return WithoutFingerprint(self.rows.select_columns(names))


@pytest.mark.parametrize("changed", [False, True])
def test_rows_without_a_fingerprint_are_named_by_their_texts(changed):
    def rows_of(texts):
        return row_files.only_text(WithoutFingerprint(datasets.Dataset.from_dict({"text": texts})), Settings())

    first, second = rows_of(TEXTS), rows_of([*TEXTS[:-1], "seven"] if changed else TEXTS)
    assert [row["text"] for row in first] == TEXTS
    assert (first.digest != second.digest) == changed
