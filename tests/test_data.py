"""Rows, tokens and blocks."""

import csv
import gzip
import json
import os
import runpy
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import PROGRAMS, ROOT, largest_file, run_program
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from train_loop.data.blocks import (
    Windows,
    block_order,
    group_texts,
    load_split,
    load_windows,
    positions_in_documents,
)
from train_loop.data.marks import ROW_BEGINS
from train_loop.data.row_files import Rows, cache_folder
from train_loop.data.rows import load_rows
from train_loop.data.text import covered_text
from train_loop.data.tokens import CHARACTERS_PER_BATCH, ROWS_PER_BATCH, tokenize_rows
from train_loop.model import load_tokenizer
from train_loop.settings.settings import Settings

LINES = ["one two\n", "\n", 'three, "four"\n', "  \n", "zwölf\n"]


def rows_of(path, **settings):
    train, validation, _ = load_rows(Settings(train_file=str(path), validation_file=str(path), **settings))
    assert texts_of(train) == texts_of(validation) and len(train) == len(texts_of(train))
    return texts_of(train)


def texts_of(rows):
    return [row["text"] for row in rows]


@pytest.fixture(scope="module")
def tokenizer():
    rows = Rows.of(["one two three four five " * 20, "six seven eight"])
    return load_tokenizer(Settings(tokenizer_vocab_size=280), rows)


@pytest.mark.quick
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


def test_each_file_of_a_folder_is_a_row_and_the_last_ones_are_held_out(tokenizer, tmp_path):
    texts = {"b.txt": "second\n\nfile", "a.md": "the first\n", "c/d.txt": "third " * 30, "e.txt": "held out"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    train, held_out, note = load_rows(Settings(train_file=str(tmp_path), validation_split_percentage=25))
    assert [row["text"] for row in train] == [texts[name] for name in ("a.md", "b.txt", "c/d.txt")]
    assert [row["text"] for row in held_out] == ["held out"] and note.startswith("the last 1 of 4 training rows")
    tokens = tokenize_rows(train, tokenizer, "training", end_of_text=0)[0].tolist()
    assert tokens == [t for row in train for t in [*tokenizer(row["text"])["input_ids"], 0]]

    (tmp_path / "a.md").write_text("another\n")
    with pytest.raises(ValueError, match=r"a\.md was changed while it was read"):
        list(train)
    assert load_rows(Settings(train_file=str(tmp_path)))[0].digest != train.digest
    (tmp_path / "c" / "d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"d\.txt cannot be read as text"):
        load_rows(Settings(train_file=str(tmp_path)))


def test_parquet_gives_the_same_rows_from_the_column_that_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"body": LINES, "title": ["t"] * 5}).to_parquet(path)
    assert rows_of(path, text_column=["body"]) == LINES
    with pytest.raises(ValueError, match="text_column may be one of: body, title"):
        rows_of(path)
    with pytest.raises(ValueError, match="no column 'bdy' of text"):
        rows_of(path, text_column=["bdy"])


@pytest.mark.quick
def test_tokens_are_those_of_each_row_by_itself_and_a_blank_line_has_none(tokenizer):
    rows = Rows.of(["one two\n", " \n", "", "three\n"])
    expected = [token for text in ("one two\n", "", "", "three\n") for token in tokenizer(text)["input_ids"]]
    assert tokenize_rows(rows, tokenizer, "test")[0].tolist() == expected


@pytest.mark.quick
def test_special_tokens_stand_in_every_row_as_the_tokenizer_puts_them():
    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    rows = Rows.of(["a b", "", "b"])
    assert tokenize_rows(rows, tokenizer, "test")[0].tolist() == [0, 1, 2, 0, 0, 2]


@pytest.mark.quick
def test_more_rows_than_fit_in_a_batch_keep_their_order(tokenizer):
    texts = [f"{i} one" for i in range(2 * ROWS_PER_BATCH + 1)] + ["two " * CHARACTERS_PER_BATCH, "three"]
    tokens = tokenize_rows(Rows.of(texts), tokenizer, "test")[0]
    assert tokenizer.decode(tokens) == "".join(texts)


def test_tokens_are_taken_from_the_cache_only_while_text_and_tokenizer_are_the_same(tokenizer, tmp_path):
    path = tmp_path / "rows.txt"

    def tokens_of(tokenizer=tokenizer, block_size=2):
        rows, _, _ = load_rows(Settings(train_file=str(path), validation_file=str(path)))
        return load_split(rows, tokenizer, "training", Settings(block_size=block_size)).blocks

    def cached():
        return {path: path.stat().st_mtime_ns for path in cache_folder().rglob("*.int32")}

    path.write_text("one two three\n" * 3)
    tokens_of()
    written = cached()
    tokens_of(), tokens_of(block_size=4)
    assert cached() == written

    times = os.stat(path)
    path.write_text("one two eight\n" * 3)  # as many bytes, and as old
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "eight" in tokenizer.decode(tokens_of().ravel())

    other, written = load_tokenizer(Settings(tokenizer_vocab_size=260), Rows.of(["zzz"])), cached()
    assert "eight" in other.decode(tokens_of(other).ravel()) and len(cached()) == len(written) + 1


@pytest.mark.quick
def test_held_out_rows_are_the_last_ones_and_never_trained_on(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"row {i}\n" for i in range(40)))
    train, validation, note = load_rows(Settings(train_file=str(path), validation_split_percentage=10))
    assert texts_of(train) + texts_of(validation) == [f"row {i}\n" for i in range(40)]
    assert len(validation) == 4 and "last 4 of 40" in note


def test_a_null_row_is_named(tokenizer):
    rows = Rows.of(["a", "b", None])
    with pytest.raises(ValueError, match="row 3 of the training data is null"):
        tokenize_rows(rows, tokenizer, "training")


def test_too_little_text_for_one_block_is_an_error(tokenizer):
    rows = Rows.of(["one"])
    with pytest.raises(ValueError, match="less than one block of 64"):
        load_split(rows, tokenizer, "training", Settings(block_size=64))
    with pytest.raises(ValueError, match="every row is empty"):
        load_split(Rows.of(["", ""]), tokenizer, "training", Settings(block_size=64))


@pytest.mark.quick
def test_the_order_of_blocks_is_a_function_of_seed_and_epoch():
    blocks = np.zeros((50, 4))
    assert block_order(blocks, 42, 1).tolist() == block_order(blocks, 42, 1).tolist()
    assert sorted(block_order(blocks, 42, 1)) == list(range(50))
    assert len({tuple(block_order(blocks, seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


@pytest.mark.quick
def test_going_through_the_data_draws_no_random_number():
    blocks = np.zeros((4, 8), dtype=np.int32)
    state = torch.random.get_rng_state()
    assert len(list(load_windows(Windows(blocks, np.arange(4), 2, 1)))) == 2
    assert torch.equal(state, torch.random.get_rng_state())


WIKITEXT = Path(__file__).parent.parent.parent / "shared" / "data" / "wikitext2"


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="WikiText-2 is not beside the checkout")
@pytest.mark.parametrize("split, words", [("valid", 217_646), ("test", 245_569)])
def test_wikitext_has_as_many_words_as_its_authors_say(split, words, tokenizer):
    with open(WIKITEXT / f"{split}.unk.txt", encoding="utf-8") as file:
        rows = Rows.of(list(file))
    text = covered_text(rows, tokenizer, None, len(tokenize_rows(rows, tokenizer, split)[0]))
    assert text.num_words + text.num_line_ends == words
    # a blank line is " \n", and counts as empty
    blank = sum(len(text) for text in texts_of(rows) if text.isspace())
    assert text.num_bytes == (WIKITEXT / f"{split}.unk.txt").stat().st_size - blank


@pytest.mark.quick
def test_documents_end_with_the_end_of_text_token_on_request(tokenizer):
    rows = Rows.of(["one two", "", "three", "four<|endoftext|>"])
    end = tokenizer.eos_token_id
    tokens = tokenize_rows(rows, tokenizer, "training", end_of_text=end)[0]
    expected = [t for text in ("one two", "three", "four") for t in (*tokenizer(text)["input_ids"], end)]
    assert tokens.tolist() == expected
    assert end not in tokenize_rows(replace(rows, span=range(3)), tokenizer, "training")[0]


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="add_eos_token: the tokenizer has no end-of-text token"):
        load_split(Rows.of(["a"]), tokenizer, "training", Settings(add_eos_token=True))


@pytest.mark.quick
def test_positions_begin_anew_with_each_row():
    begins = np.array([[1, 0, 0, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0]])
    rows = np.array([[9, 9, 0, 9, 0, 0, 9, 9], [0, 9, 9, 9, 9, 9, 9, 0]], dtype=np.int32) | begins * ROW_BEGINS
    assert positions_in_documents(rows).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    window = Windows(rows, np.arange(2), 2, 1, documents_apart=True)[0]
    assert window["labels"][0].tolist() == [[-100, 9, 0, -100, 0, -100, -100, 9], [-100, -100, 9, 9, 9, 9, 9, 0]]


def test_a_text_file_has_the_rows_that_datasets_would_read(tmp_path):
    """Line ends of every kind, at every place: what separates lines elsewhere stays, a last line may lack its end, and
    bytes that belong together lie on both sides of the boundaries at which a file is read."""
    megabyte = 1 << 20
    contents = {
        "plain": b"one\ntwo\n",
        "no last newline": b"one\n\n two",
        "other systems": b"one\r\ntwo\rthree\r\r\n\nfour\r",
        "other separators": "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\x00\ufeff\n".encode(),
        "byte order mark": b"\xef\xbb\xbfone\ntwo",
        "line end over a boundary": b"a" * (megabyte - 1) + b"\r\nb" + b"c" * (megabyte - 3) + b"\n" + b"d" * megabyte,
        "character over a boundary": ("a" * (megabyte - 1) + "\u20ac" + "\U0001f600" * megabyte + "\n").encode() * 2,
        "line over boundaries": b"one\n" + b"a" * (3 * megabyte) + b"\r\ntwo",
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.txt"
        path.write_bytes(content)
        theirs = datasets.load_dataset(
            "text", data_files=str(path), split="train", encoding="utf-8-sig", keep_linebreaks=True
        )
        assert rows_of(path) == list(theirs["text"]), name


@pytest.mark.parametrize("where", ["at a boundary", "at the end"])
def test_bytes_that_are_no_utf8_are_found_wherever_they_stand(where, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"a" * ((1 << 20) - 1) + b"\xe2\x82" + b"\n" * (where == "at a boundary"))
    with pytest.raises(ValueError, match=r"rows.txt cannot be read as text: line 1: it is not UTF-8 text \("):
        rows_of(path)


def byte_level_bpe():
    return load_tokenizer(Settings(tokenizer_vocab_size=300), Rows.of(ODD_ROWS))


def llama_like():
    """Spaces as a letter, bytes where a letter is not known, and a token before each row."""
    letters = sorted({*"".join(ODD_ROWS).replace("😀", "").replace(" ", "▁")})
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁o"]
    vocab = {token: i for i, token in enumerate(vocab)}
    backend = Tokenizer(models.BPE(vocab, [("▁", "o")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def with_settings_of_its_own():
    """Its file says to cut and fill up rows: a call does neither, unless asked to."""
    words = dict.fromkeys(word for row in ODD_ROWS for word in row.lower().split())
    backend = Tokenizer(models.WordLevel({"<unk>": 0, **{w: i for i, w in enumerate(words, start=1)}}, "<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", split_special_tokens=True)


class Reversing(PreTrainedTokenizerFast):
    """A class with Python code of its own in the call, as remote code may have."""

    def _encode_plus(self, text, *args, **options):
        return super()._encode_plus([row[::-1] for row in text] if isinstance(text, list) else text[::-1], **options)


def with_code_of_its_own():
    return Reversing(tokenizer_object=byte_level_bpe().backend_tokenizer, eos_token="<|endoftext|>")


ODD_ROWS = [
    "One two  three\n",
    "",
    "naïve café — 日本語 😀\u0301\n",
    "a <|endoftext|> in the middle, <s> and <unk> too\n",
    "<|endoftext|>",
    " leading and trailing \n",
    "\tdef f(x):\r    return x_1 ** 2\n",
    "o" * 5000,
]


@pytest.mark.parametrize("make", [byte_level_bpe, llama_like, with_settings_of_its_own, with_code_of_its_own])
def test_tokens_equal_the_tokenizers_own_row_by_row(make):
    plain = make()
    expected = [token for row in ODD_ROWS * 50 for token in plain(row)["input_ids"]]
    assert tokenize_rows(Rows.of(ODD_ROWS * 50), make(), "test")[0].tolist() == expected


class OneAtATime(PreTrainedTokenizerFast):
    """A class whose Python code is not safe for two threads."""

    busy = threading.Lock()

    def _encode_plus(self, *args, **options):
        assert self.busy.acquire(blocking=False), "two threads are in it"
        try:
            time.sleep(0.02)
            return super()._encode_plus(*args, **options)
        finally:
            self.busy.release()


def test_a_tokenizer_with_code_of_its_own_is_called_by_one_thread_at_a_time():
    tokenizer = OneAtATime(tokenizer_object=byte_level_bpe().backend_tokenizer, eos_token="<|endoftext|>")
    texts = ["a"] * (4 * ROWS_PER_BATCH)
    assert len(tokenize_rows(Rows.of(texts), tokenizer, "test")[0]) >= len(texts)


def test_tokens_are_those_of_the_tokenizer_however_little_of_it_changes():
    """Its vocabulary, its class, or a setting that its saved form does not have. Whether it was used before does not
    count."""

    def name_of(tokenizer, end_of_text=None):
        return tokenize_rows(Rows.of(ODD_ROWS), tokenizer, "test", end_of_text)[0].filename

    used, other = with_settings_of_its_own(), with_settings_of_its_own()
    used("a row", truncation=True, max_length=3)
    assert name_of(used) == name_of(with_settings_of_its_own())
    other.split_special_tokens = False
    added = byte_level_bpe()
    added.add_tokens(["naïve"])
    names = [name_of(tokenizer) for tokenizer in (used, other, added, byte_level_bpe(), with_code_of_its_own())]
    assert len({*names, name_of(byte_level_bpe(), end_of_text=0)}) == 6


def test_a_text_file_that_changes_while_it_is_read_is_an_error_and_leaves_no_tokens(tokenizer, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("one two\n" * 50)
    rows, _, _ = load_rows(Settings(train_file=str(path), validation_file=str(path)))
    path.write_text("one six\n" * 50)
    before = set(cache_folder().rglob("*.int32"))
    with pytest.raises(ValueError, match=r"rows.txt was changed while it was read: start again"):
        tokenize_rows(rows, tokenizer, "training")
    assert set(cache_folder().rglob("*.int32")) == before and not list(cache_folder().rglob("*.partial"))


def test_a_kill_leaves_nothing_that_is_taken_for_finished_and_the_next_run_clears_it_away(text_file, tmp_path):
    """And all that without importing `datasets`, which takes a second."""
    large, small = tmp_path / "large.txt", tmp_path / "small.txt"
    large.write_text(text_file.read_text(encoding="utf-8") * 400, encoding="utf-8")
    small.write_text("one two three\n" * 40, encoding="utf-8")
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, PROGRAMS / "prepares_tokens.py", str(large)], env=environment)
    try:
        deadline = time.monotonic() + 300
        while not any(path.stat().st_size for path in tmp_path.rglob("*.partial")) and time.monotonic() < deadline:
            assert killed.poll() is None
            time.sleep(0.01)
    finally:
        killed.kill()
        killed.wait()
    assert len(list(tmp_path.rglob("*.partial"))) == 1 and not list(tmp_path.rglob("*.int32"))
    done = run_program("prepares_tokens.py", small, HF_HOME=str(tmp_path))
    assert done.stdout.split() == ["10", "False"], done.stderr  # 20 rows of 4 tokens
    assert len(list(tmp_path.rglob("*.int32"))) == 1 and not list(tmp_path.rglob("*.partial"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_full_disk_ends_with_a_sentence_and_the_next_run_does_the_work(tokenizer, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    rows, _, _ = load_rows(Settings(train_file=str(text_file), validation_file=str(text_file)))
    said = f"tokens of the training data cannot be written to {tmp_path}.*: File too"
    with largest_file(10_000), pytest.raises(ValueError, match=said):
        tokenize_rows(rows, tokenizer, "training")
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.int32"))
    assert tokenizer.decode(tokenize_rows(rows, tokenizer, "training")[0]).startswith('The "assert" statement\n***')


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "/xdg"},
        {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "~/hf"},
        {"HF_HOME": "/hf", "HF_DATASETS_CACHE": "/sets"},
    ],
)
def test_the_cache_is_where_datasets_has_its_own(environment, monkeypatch):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == runpy.run_path(datasets.config.__file__)["HF_DATASETS_CACHE"]
