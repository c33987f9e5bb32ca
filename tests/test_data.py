"""Rows, tokens and blocks."""

import csv
import gzip
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from train_loop.config import Settings
from train_loop.data import (
    Windows,
    count_words,
    group_texts,
    load_rows,
    load_split,
    load_windows,
    positions_in_documents,
    shuffled,
    tokenize_rows,
)
from train_loop.model import load_tokenizer

LINES = ["one two\n", "\n", 'three, "four"\n', "  \n", "zwölf\n"]


def rows_of(path, **settings):
    train, validation, _ = load_rows(Settings(train_file=str(path), validation_file=str(path), **settings))
    assert train["text"] == validation["text"] or list(train["text"]) == list(validation["text"])
    return list(train["text"])


@pytest.fixture(scope="module")
def tokenizer():
    rows = datasets.Dataset.from_dict({"text": ["one two three four five " * 20, "six seven eight"]})
    return load_tokenizer(Settings(tokenizer_vocab_size=280), rows)


def test_group_texts_cuts_over_all_rows_and_counts_what_is_left():
    blocks, num_dropped = group_texts([[1, 1, 1], [2, 2, 2], [], [4, 4, 4]], 2)
    assert blocks.tolist() == [[1, 1], [1, 2], [2, 2], [4, 4]]
    assert num_dropped == 1


def test_group_texts_does_not_copy_a_single_array():
    tokens = np.arange(10, dtype=np.int32)
    blocks, num_dropped = group_texts([tokens], 4)
    assert np.shares_memory(blocks, tokens) and num_dropped == 2


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv"])
def test_every_kind_of_file_gives_the_same_rows(kind, compressed, tmp_path):
    path = tmp_path / f"rows.{kind}{'.gz' if compressed else ''}"
    with (gzip.open if compressed else open)(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "txt":
            file.writelines(LINES)
        elif kind == "jsonl":
            file.writelines(json.dumps({"text": line, "id": i}) + "\n" for i, line in enumerate(LINES))
        elif kind == "json":
            json.dump([{"text": line} for line in LINES], file)
        else:
            csv.writer(file, lineterminator="\n").writerows(
                [["text", "id"], *([line, i] for i, line in enumerate(LINES))]
            )
    assert rows_of(path) == LINES


def test_parquet_gives_the_same_rows_from_the_column_that_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"body": LINES, "title": ["t"] * 5}).to_parquet(path)
    assert rows_of(path, text_column="body") == LINES
    with pytest.raises(ValueError, match="text_column may be one of: body, title"):
        rows_of(path)
    with pytest.raises(ValueError, match="no column 'bdy' of text"):
        rows_of(path, text_column="bdy")


def test_tokens_are_those_of_each_row_by_itself_and_a_blank_line_has_none(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["one two\n", " \n", "", "three\n"]})
    expected = [token for text in ("one two\n", "", "", "three\n") for token in tokenizer(text)["input_ids"]]
    assert tokenize_rows(rows, tokenizer, "test")[0].tolist() == expected


def test_special_tokens_stand_in_every_row_as_the_tokenizer_puts_them():
    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    rows = datasets.Dataset.from_dict({"text": ["a b", "", "b"]})
    assert tokenize_rows(rows, tokenizer, "test")[0].tolist() == [0, 1, 2, 0, 0, 2]


def test_more_rows_than_fit_in_a_batch_keep_their_order(tokenizer):
    texts = [f"{i} one" for i in range(2500)]
    tokens, _, _ = tokenize_rows(datasets.Dataset.from_dict({"text": texts}), tokenizer, "test")
    assert tokenizer.decode(tokens) == "".join(texts)


def test_tokens_are_taken_from_the_cache_only_while_text_and_tokenizer_are_the_same(tokenizer, tmp_path):
    path = tmp_path / "rows.txt"

    def tokens_of(tokenizer=tokenizer, block_size=2):
        rows, _, _ = load_rows(Settings(train_file=str(path), validation_file=str(path)))
        return load_split(rows, tokenizer, "training", Settings(block_size=block_size)).blocks

    path.write_text("one two three\n" * 3)
    first, again = tokens_of(), tokens_of()
    base = np.asarray(first).base if first.base is None else first.base
    assert os.stat(base.filename).st_ino == os.stat(again.base.filename).st_ino
    assert first.base.filename == tokens_of(block_size=4).base.filename

    times = os.stat(path)
    path.write_text("one two eight\n" * 3)  # as many bytes, and as old
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "eight" in tokenizer.decode(tokens_of().ravel())

    other = load_tokenizer(Settings(tokenizer_vocab_size=260), datasets.Dataset.from_dict({"text": ["zzz"]}))
    assert tokens_of(other).base.filename != tokens_of().base.filename


def test_held_out_rows_are_the_last_ones_and_never_trained_on(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"row {i}\n" for i in range(40)))
    train, validation, note = load_rows(Settings(train_file=str(path), validation_split_percentage=10))
    assert list(train["text"]) + list(validation["text"]) == [f"row {i}\n" for i in range(40)]
    assert len(validation) == 4 and "last 4 of 40" in note


def test_a_null_row_is_named(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["a", "b", None]})
    with pytest.raises(ValueError, match="row 3 of the training data is null"):
        tokenize_rows(rows, tokenizer, "training")


def test_too_little_text_for_one_block_is_said(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["one"]})
    with pytest.raises(ValueError, match="less than one block of 64"):
        load_split(rows, tokenizer, "training", Settings(block_size=64))
    with pytest.raises(ValueError, match="every row is empty"):
        load_split(datasets.Dataset.from_dict({"text": ["", ""]}), tokenizer, "training", Settings(block_size=64))


def test_the_order_of_blocks_is_a_function_of_seed_and_epoch():
    assert shuffled(50, 42, 1).tolist() == shuffled(50, 42, 1).tolist()
    assert sorted(shuffled(50, 42, 1)) == list(range(50))
    assert len({tuple(shuffled(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


def test_going_through_the_data_draws_no_random_number():
    blocks = np.zeros((4, 8), dtype=np.int32)
    state = torch.random.get_rng_state()
    assert len(list(load_windows(Windows(blocks, np.arange(4), 2, 1)))) == 2
    assert torch.equal(state, torch.random.get_rng_state())


def test_words_are_counted_as_wikitext_counts_them():
    """White space separates them, and each line ends with one more; so the published sizes of WikiText-2 come out."""
    assert count_words(" = Title = \n") == 4 and count_words("") == 1 and count_words("one two") == 3
    assert sum(map(count_words, ["a b\n", "\n", "c"])) == count_words("a b\n\nc")


WIKITEXT = Path(__file__).parent.parent.parent / "shared" / "data" / "wikitext2"


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="WikiText-2 is not beside the checkout")
@pytest.mark.parametrize("split, words", [("valid", 217_646), ("test", 245_569)])
def test_wikitext_has_as_many_words_as_its_authors_say(split, words, tokenizer):
    with open(WIKITEXT / f"{split}.unk.txt", encoding="utf-8") as file:
        rows = datasets.Dataset.from_dict({"text": list(file)})
    _, num_words, num_bytes = tokenize_rows(rows, tokenizer, split)
    assert num_words == words
    # a blank line is " \n", and counts as empty
    blank = sum(len(text) for text in rows["text"] if text.isspace())
    assert num_bytes == (WIKITEXT / f"{split}.unk.txt").stat().st_size - blank


def test_documents_end_with_the_end_of_text_token_on_request(tokenizer):
    rows = datasets.Dataset.from_dict({"text": ["one two", "", "three", "four<|endoftext|>"]})
    end = tokenizer.eos_token_id
    tokens, _, _ = tokenize_rows(rows, tokenizer, "training", end_of_text=end)
    expected = [t for text in ("one two", "three", "four") for t in (*tokenizer(text)["input_ids"], end)]
    assert tokens.tolist() == expected
    assert end not in tokenize_rows(rows.select(range(3)), tokenizer, "training")[0]


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="add_eos_token: the tokenizer has no end-of-text token"):
        load_split(datasets.Dataset.from_dict({"text": ["a"]}), tokenizer, "training", Settings(add_eos_token=True))


def test_positions_begin_anew_after_each_document():
    rows = np.array([[9, 9, 0, 9, 0, 0, 9, 9], [0, 9, 9, 9, 9, 9, 9, 0]])
    assert positions_in_documents(rows, 0).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    window = Windows(rows.astype(np.int32), np.arange(2), 2, 1, document_end=0)[0]
    assert window["labels"][0].tolist() == [[-100, 9, 0, -100, 0, -100, -100, 9], [-100, -100, 9, 9, 9, 9, 9, 0]]
