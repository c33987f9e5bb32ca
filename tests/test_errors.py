"""What a user's mistake ends with: one sentence, exit status 1, no traceback, nothing written."""

import json
import os
import re
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ONLINE, PROGRAMS, TINY, TINY_CONFIGS, parquet, run
from forks import forked
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop import generate
from train_loop.data import Split
from train_loop.errors import num_of, with_line
from train_loop.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory: whatever a failing run writes would show."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_sentence(argv, capsys, folder, said):
    before = sorted(folder.rglob("*"))
    assert main(argv) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("Generating ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], err
    assert out == "" and "Traceback" not in err and len(lines[0]) < 700
    assert sorted(folder.rglob("*")) == before


PARQUET = parquet([{"text": "some text\n"}] * 50)
BAD_FILES = {
    "empty.txt": (b"", "empty.txt is empty"),
    "blank.txt": (b"\n\n \n", "no tokens"),
    "short.txt": (b"few\nwords\n", "less than one block of 32"),
    "latin1.txt": ("caf\xe9\n".encode("latin-1") * 50, "latin1.txt cannot be read as text"),
    "binary.txt": (bytes(range(256)) * 20, "binary.txt cannot be read as text"),
    "cut.txt.gz": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03KL\x84\x01", "cut.txt.gz cannot be read as text"),
    "not.parquet": (b"PAR1 but no parquet", "not.parquet cannot be read as parquet"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "broken.jsonl cannot be read as json"),
    "line.jsonl": (
        b'{"text": "a"}\n' * 7 + b'{"text": b}\n{"text": "c"}\n',
        "line.jsonl cannot be read as json: line 8:",
    ),
    "half.jsonl": (b'{"text": "a"}\n' * 9 + b'{"text": "b', "half.jsonl cannot be read as json: line 10:"),
    "half.csv": (b'text\n"a"\n"b', "half.csv cannot be read as csv"),
    "half.parquet": (PARQUET[: len(PARQUET) // 2], "half.parquet cannot be read as parquet"),
    "headless.parquet": (PARQUET[99:], "headless.parquet cannot be read as parquet"),
    "zeros.jsonl": (bytes(500), "zeros.jsonl cannot be read as json"),
    "zeros.txt.gz": (bytes(500), "zeros.txt.gz cannot be read as text"),
    "latin1.jsonl": ('{"text": "caf\xe9"}\n'.encode("latin-1") * 5, "latin1.jsonl cannot be read as json"),
    "utf16.txt": ("some text\n".encode("utf-16") * 5, "utf16.txt cannot be read as text"),
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "empty.parquet": (b"", "empty.parquet is empty"),
    "header.csv": (b"text\n", "header.csv"),
    "list.json": (b'["a", "b"]', "less than one block"),
    "nulls.jsonl": (b'{"text": null}\n' * 5, "line 1: 'text' is null"),
    "no_ending": (b"text", "this kind of file is unknown"),
    "other.jsonl": (b'{"body": "a", "title": "b"}\n' * 5, "text_column may be one of: body, title"),
    "numbers.csv": (b"a,b\n1,2\n3,4\n", "text_column may be one of: a, b"),
    "null.jsonl": (
        b'{"text": "a"}\n{"text": null}\n{"text": "c"}\n',
        "null.jsonl, line 2: 'text' is null",
    ),
    "unknown.docx": (b"text", "this kind of file is unknown"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_ends_with_one_sentence(name, folder, capsys):
    content, said = BAD_FILES[name]
    (folder / name).write_bytes(content)
    files = [f"--train_file={name}"]
    if not name.startswith(("empty", "unknown", "no_ending")):  # said at once, and of each file
        files += [f"--validation_file={name}"]
    one_sentence([*TINY, *files, "--output_dir=out"], capsys, folder, said)


BAD_ARGUMENTS = {
    "a wrong path": (["--train_file=no.txt"], "no.txt: no such file"),
    "a folder without text": (["--train_file=."], ".: there is no text file in it"),
    "an unknown flag": (["--learning_rte=1"], "did you mean --learning_rate?"),
    "a recipe that is not there": (["--config=quickstrt"], "recipes are"),
    "a block too long": (["--block_size=65"], "65, but the model has 64 positions"),
    "an unknown architecture": (["--model_type=gpt5"], "gpt5 is not an architecture"),
    "an unknown part of the config": (["--config_overrides=n_layr=1"], "n_layr=1"),
    "a tokenizer that is not there": (["--tokenizer_name=none/such"], "tokenizer 'none/such'"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_a_bad_argument_ends_with_one_sentence(name, folder, text_file, capsys):
    arguments, said = BAD_ARGUMENTS[name]
    given = [word for word in TINY if not (name.startswith("a tokenizer") and "tokenizer" in word)]
    one_sentence([*given, f"--train_file={text_file}", "--output_dir=out", *arguments], capsys, folder, said)


def test_an_unknown_recipe_key_is_named_with_the_one_that_was_meant(folder, capsys):
    (folder / "mine.yaml").write_text("model_type: gpt2\nblok_size: 3\n")
    one_sentence(["--config=mine.yaml"], capsys, folder, "blok_size is not a setting; did you mean block_size?")


def test_a_model_that_is_not_there_ends_with_one_sentence(folder, text_file, capsys):
    arguments = ["--model_name_or_path=none/such", f"--train_file={text_file}", "--output_dir=out"]
    one_sentence(arguments, capsys, folder, "'none/such' cannot be loaded")


@pytest.mark.parametrize("name", ["./none", "/none/such", "models/none/such"])
def test_a_missing_path_is_not_looked_up_on_the_hub(name, folder, text_file, capsys):
    arguments = [f"--model_name_or_path={name}", f"--train_file={text_file}", "--output_dir=out"]
    one_sentence(arguments, capsys, folder, f"{name!r} cannot be loaded: there is no such folder")


def test_a_folder_that_is_no_model_ends_with_one_sentence(folder, text_file, capsys):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"hello": 1}))
    arguments = ["--model_name_or_path=model", f"--train_file={text_file}", "--output_dir=out"]
    one_sentence(arguments, capsys, folder, "holds no usable model config")


def test_a_data_set_that_is_not_there_is_one_sentence_that_offers_train_file(folder, capsys):
    one_sentence([*TINY, "--dataset_name=none/such", "--output_dir=out"], capsys, folder, "train_file")


def test_generating_from_a_run_that_has_not_exported_its_model_says_how_to_resume_it(tmp_path, capsys):
    (tmp_path / "train_config.yaml").touch()
    assert generate.main([str(tmp_path), "The value of"]) == 1
    assert (
        f"error: the run in {tmp_path} has not exported its model yet. To finish it: its command with --resume"
        in capsys.readouterr().err
    )


def test_an_output_dir_that_is_a_file_is_refused_and_kept(folder, text_file, capsys):
    (folder / "out").write_text("kept")
    one_sentence(
        [*TINY, f"--train_file={text_file}", "--output_dir=out"], capsys, folder, "out is a file: choose another name"
    )
    assert (folder / "out").read_text() == "kept"


def test_a_hub_that_cannot_be_reached_is_noticed_within_seconds(folder, nobody_there):
    """And with an own empty cache. The password in the hub's address is never printed."""
    address = nobody_there.replace("http://", "http://me:secret@")
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache")}
    arguments = ["-m", "train_loop.main", "--config=distilgpt2_wikitext2"]
    done = run(*arguments, launcher=(*ONLINE, sys.executable), **environment)
    first, second = done.stderr.splitlines()[:2]  # with torch 2.15 triton may say something at the end of a process
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{nobody_there} cannot be reached" in first and "secret" not in done.stdout + done.stderr
    assert second.startswith("error: model config 'distilgpt2'") and "give the path of a folder" in second


def test_both_processes_of_a_launch_end_with_one_sentence(folder, text_file):
    (folder / "few.txt").write_text("few words")
    files = [f"--train_file={folder}/few.txt", f"--validation_file={folder}/few.txt"]
    done = forked("train_loop/main.py", *TINY, *files, f"--output_dir={folder}/out", processes=2)
    assert done.returncode == 1 and not (folder / "out").exists()
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: the validation data has 1 row of 2 tokens together, less than one block of 32: give a block_size of at "
        "most 2, or more text"
    ]


def test_an_error_on_one_process_is_printed_by_that_process(folder, text_file):
    """The other one waits for it to join: no longer than ddp_timeout, else until the launcher kills it."""
    arguments = [*TINY, f"--train_file={text_file}", f"--output_dir={folder}/out", "--ddp_timeout=5"]
    done = forked(PROGRAMS / "own_error_of_rank_1.py", *arguments, processes=2)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: process 1: train_file none.txt: no such file"
    ]


def broken_model(folder, what):
    """A tiny model's folder with its tokenizer, and something wrong with it."""
    from train_loop.model import load_tokenizer
    from train_loop.settings.settings import Settings

    vocab_size = 200 if what == "tokenizer too large" else 300
    config = AutoConfig.for_model("gpt2", vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **TINY_CONFIGS["gpt2"])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rows = datasets.Dataset.from_dict({"text": ["a few words of some text"] * 9})
    load_tokenizer(Settings(tokenizer_vocab_size=270), rows).save_pretrained(folder)
    weights = folder / "model.safetensors"
    if what == "no weights":
        weights.unlink()
    elif what == "truncated":
        os.truncate(weights, weights.stat().st_size - 100)
    elif what == "emptied":
        os.truncate(weights, 0)
    elif what == "a weight missing":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["transformer.h.1.mlp.c_fc.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "another shape":
        config.n_embd = 64
        config.save_pretrained(folder)
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif what == "pickled weights":
        weights.unlink()
        torch.save({"code": print}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "what, said",
    [
        ("no weights", "holds no usable model: "),
        ("truncated", "holds no usable model: "),
        ("emptied", "holds no usable model: "),
        ("a weight missing", "lacks 1 weight, e.g. transformer.h.1.mlp.c_fc.weight"),
        ("another shape", "holds no usable model: "),
        ("no tokenizer", "holds no usable tokenizer: it has no vocabulary"),
        ("tokenizer too large", "the tokenizer has tokens beyond the model's vocabulary of 200"),
        ("pickled weights", "holds no usable model: "),
    ],
)
def test_a_broken_model_folder_ends_with_one_sentence(what, said, folder, text_file, capsys):
    broken_model(folder / "model", what)
    capsys.readouterr()
    arguments = ["--model_name_or_path=model", "--block_size=32", f"--train_file={text_file}", "--output_dir=out"]
    one_sentence(arguments, capsys, folder, said)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_an_output_dir_that_is_read_only_is_refused(folder, text_file, capsys):
    (folder / "kept").mkdir(mode=0o555)
    one_sentence([*TINY, f"--train_file={text_file}", "--output_dir=kept/out"], capsys, folder, "no permission")


@pytest.mark.parametrize("output_dir", ["/proc/out", "/dev/null/out"])
def test_an_output_dir_where_nothing_can_be_made_is_refused(output_dir, folder, text_file, capsys):
    arguments = [*TINY, f"--train_file={text_file}", f"--output_dir={output_dir}"]
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: output_dir {output_dir} ") and "Errno" not in line


def test_one_block_is_not_one_blocks():
    split = Split("validation", np.zeros((1, 8), dtype=np.int32), 1, 9, 1)
    assert split.summary() == "1 row -> 9 tokens -> 1 block of 8; 1 token dropped"
    assert [num_of(n, "process") for n in (0, 1, 2000)] == ["0 processes", "1 process", "2,000 processes"]


def raised_by(function):
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def test_a_failing_device_is_told_in_a_sentence_and_a_possible_bug_with_the_line_of_this_package(tmp_path):
    missing = raised_by((tmp_path / "none").read_text)
    assert with_line(missing) == f"[Errno 2] No such file or directory: '{tmp_path}/none'"
    ours, library = raised_by(lambda: num_of("x", "block")), raised_by(lambda: json.loads("{"))
    assert re.fullmatch(
        r"ValueError: Cannot specify ',' with 's' \(.*/train_loop/errors\.py, line \d+\)", with_line(ours)
    )
    assert re.fullmatch(r"JSONDecodeError: .* \(.*/json/decoder\.py, line \d+\)", with_line(library))
    outer = RuntimeError("the outer one")
    outer.__cause__ = ours
    assert with_line(outer) == with_line(ours)
