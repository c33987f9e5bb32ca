"""Cached tokens: verified when they are opened, made again when they are damaged or the code has changed, removed when
they are old."""

import importlib.util
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PROGRAMS
from forks import forked
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from train_loop import cache
from train_loop.data import token_cache, tokens
from train_loop.data.blocks import load_split
from train_loop.data.row_files import Rows
from train_loop.data.rows import load_rows
from train_loop.data.token_cache import HEADER, PIECE_BYTES, cached_tokens, open_or_make
from train_loop.data.tokens import encode, tokenize_rows
from train_loop.settings.settings import Settings


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    return tmp_path / "train_loop" / "tokens"


@pytest.fixture(scope="module")
def tokenizer():
    """Words, and a token that begins each row."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


ROWS = Rows.of(["a b a"] * 50)


def change_one_token(content):
    content[-4] ^= 1


def change_the_number_of_tokens(content):
    content[0] ^= 1


def swap_two_tokens(content):
    content[-8:] = content[-4:] + content[-8:-4]


def cut_one_token(content):
    del content[-4:]


def add_one_token(content):
    content += bytes(4)


def zeros(content):
    content[:] = bytes(len(content))


def zeros_after_the_header(content):
    content[HEADER.size :] = bytes(len(content) - HEADER.size)


def empty(content):
    content.clear()


def half_a_header(content):
    del content[30:]


DAMAGES = [
    *(change_one_token, change_the_number_of_tokens, swap_two_tokens, cut_one_token, add_one_token),
    *(zeros, zeros_after_the_header, empty, half_a_header),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_tokens_are_made_again_with_a_line(damage, tokenizer, folder, capsys):
    expected = tokenize_rows(ROWS, tokenizer, "training")[0].tolist()
    (path,) = folder.glob("*.int32")
    whole = path.read_bytes()
    content = bytearray(whole)
    damage(content)
    path.write_bytes(content)
    found = tokenize_rows(ROWS, tokenizer, "training")[0]
    assert found.tolist() == expected and path.read_bytes() == whole
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"warning: the cached tokens {path} are damaged (")
    tokenize_rows(ROWS, tokenizer, "training")
    assert not capsys.readouterr().err


def test_one_changed_bit_is_found_wherever_it_stands_in_a_large_file(folder):
    """Among pieces that are digested by themselves: in the first, in the last, and the order of two of them."""
    tokens = np.arange(PIECE_BYTES // 4 * 2 + 5, dtype=np.int32)
    (path,) = [open_or_make("large", lambda file: file.write(tokens)).filename]
    whole = Path(path).read_bytes()
    for place in (HEADER.size, HEADER.size + PIECE_BYTES, len(whole) - 1):
        Path(path).write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        with pytest.raises(token_cache.Damaged):
            token_cache._open(Path(path))
    first, second = (whole[HEADER.size + i * PIECE_BYTES :][:PIECE_BYTES] for i in (0, 1))
    Path(path).write_bytes(whole[: HEADER.size] + second + first + whole[HEADER.size + 2 * PIECE_BYTES :])
    with pytest.raises(token_cache.Damaged):
        token_cache._open(Path(path))


def test_a_changed_encode_is_used_at_once(tokenizer, tmp_path):
    """The code that makes tokens belongs to their name: here a copy of it in which one line is different."""
    plain = tokenize_rows(ROWS, tokenizer, "training")[0].tolist()
    copy = Path(shutil.copytree(Path(tokens.__file__).parent, tmp_path / "copy"))
    code = (copy / "tokens.py").read_text()
    changed = code.replace(
        "return np.fromiter(chain.from_iterable(rows)", "return 1 + np.fromiter(chain.from_iterable(rows)"
    )
    assert changed != code
    (copy / "tokens.py").write_text(changed)
    spec = importlib.util.spec_from_file_location("changed_tokens", copy / "tokens.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.tokenize_rows(ROWS, tokenizer, "training")[0].tolist() == [token + 1 for token in plain]
    assert tokenize_rows(ROWS, tokenizer, "training")[0].tolist() == plain


def test_a_changed_reader_of_files_makes_other_names(tmp_path):
    copy = Path(shutil.copytree(Path(tokens.__file__).parent, tmp_path / "copy"))
    names = set()
    for name in (None, "tables.py", "json_files.py", "text_files.py", "row_files.py"):
        if name:
            (copy / name).write_text((copy / name).read_text() + "\n# a comment\n")
        spec = importlib.util.spec_from_file_location("copied_tokens", copy / "tokens.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names.add(module.CODE)
    assert len(names) == 5 and tokens.CODE in names


def test_tokens_not_used_for_long_are_removed_when_new_ones_are_made(tokenizer, folder):
    tokenize_rows(ROWS, tokenizer, "training")
    tokenize_rows(Rows.of(["b"]), tokenizer, "training")
    first, second = sorted(folder.glob("*.int32"), key=lambda path: -path.stat().st_size)
    long_ago = time.time() - (token_cache.MAX_DAYS + 1) * 86_400
    for path in (first, second):
        os.utime(path, (long_ago, long_ago))
    tokenize_rows(ROWS, tokenizer, "training")  # used: it stays, though it was made long ago
    tokenize_rows(Rows.of(["a"]), tokenizer, "training")
    assert first.exists() and not second.exists() and first.stat().st_mtime == pytest.approx(long_ago)


def test_the_command_lists_and_clears(tokenizer, folder, capsys):
    tokens = tokenize_rows(ROWS, tokenizer, "training")[0]
    (path,) = folder.glob("*.int32")
    assert cache.main(["list"]) == 0
    said = capsys.readouterr().out
    assert f"0.0 MB  {time.strftime('%Y-%m-%d')}  {path}\n1 file, " in said
    assert cache.main(["clear"]) == 0 and not list(cached_tokens()) and not path.exists()
    assert tokens.tolist()[:3] == [0, 2, 3]  # whoever has it open keeps it
    assert cache.main([]) == 2 and "python -m train_loop.cache clear" in capsys.readouterr().err


def test_of_several_processes_one_makes_the_tokens_and_one_that_is_killed_leaves_none(folder):
    killed = forked(PROGRAMS / "makes_tokens.py", "die")
    assert killed.stdout == "made\n" and killed.returncode == -9
    assert list(folder.glob("*.partial")) and not list(folder.glob("*.int32"))
    lived = forked(PROGRAMS / "makes_tokens.py", "live", processes=2)
    assert sorted(lived.stdout.split()) == ["100000", "100000", "made"], lived.stderr
    assert not list(folder.glob("*.partial"))


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="there is no folder in which nobody may write")
def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(tokenizer, monkeypatch):
    """In /sys not even root may make a folder."""
    monkeypatch.setenv("HF_DATASETS_CACHE", "/sys/kernel/no")
    said = "tokens of the training data cannot be written to /sys/kernel/no/.*Set HF_DATASETS_CACHE .or HF_HOME. to"
    with pytest.raises(ValueError, match=said):
        tokenize_rows(ROWS, tokenizer, "training")


def test_an_empty_row_is_no_document_and_gets_neither_a_beginning_nor_an_end(tokenizer):
    """Without add_eos_token an empty row is what the tokenizer makes of it: here the one token that begins a row."""
    assert encode(["a", "", "b"], tokenizer, None).tolist() == [0, 2, 0, 0, 3]
    assert encode(["a", "", "b"], tokenizer, 1).tolist() == [0, 2, 1, 0, 3, 1]
    assert encode(["", ""], tokenizer, 1).tolist() == []
    with pytest.raises(ValueError, match="every row is empty"):
        load_split(Rows.of(["", ""]), tokenizer, "training", Settings(block_size=4, add_eos_token=True))


def test_held_out_rows_that_fill_no_block_name_the_settings_that_help(tokenizer, tmp_path):
    (tmp_path / "rows.txt").write_text("a b a b\n" * 20)
    settings = Settings(train_file=str(tmp_path / "rows.txt"), block_size=32)
    train, held_out, _ = load_rows(settings)
    assert load_split(train, tokenizer, "training", settings).num_blocks == 2
    said = (
        "validation data has 1 row of 5 tokens together, less than one block of 32: give a validation_split_percentage"
    )
    with pytest.raises(ValueError, match=f"{said} above 5, .* or a block_size of at most 5"):
        load_split(held_out, tokenizer, "validation", settings)
