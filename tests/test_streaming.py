"""Training data that is streamed: the same blocks as prepared ones, from any place on, in a run that cannot be lost."""

import dataclasses
import glob
import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import (
    NO_DROPOUT,
    ONLINE,
    PROGRAMS,
    assert_lines_agree,
    assert_same_run,
    copy_until,
    lines_of,
    run_program,
    without_timings,
)
from forks import forked
from hub_server import HubServer

from train_loop.checkpoint.durable import steps_in
from train_loop.data import blocks as data
from train_loop.data import sources, streaming
from train_loop.data.rows import Rows, load_rows
from train_loop.main import main
from train_loop.model import load_tokenizer
from train_loop.position import Position
from train_loop.settings.command_line import read_settings
from train_loop.settings.settings import Settings

ALONE = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
T = 16


@pytest.fixture(scope="module")
def texts(text_file):
    """Rows of prose: blank ones, one longer than a chunk, and letters of more than a byte among them."""
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)[:300]
    return [*lines[:100], "\n", "ein äußerst langes Wort " * 200 + "\n", *lines[100:], "the end\n"]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    tokenizer = load_tokenizer(Settings(tokenizer_vocab_size=300), Rows.of(texts))
    tokenizer.save_pretrained(tmp_path_factory.mktemp("tokenizer"))
    return tokenizer


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Small chunks, so that the text has about thirty."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 500)


def write(kind, folder, texts):
    """A file of this kind with these rows."""
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path, batch_size=50)
    elif kind == "csv":
        datasets.Dataset.from_dict({"text": texts}).to_csv(path)
    else:
        lines = texts if kind.startswith("txt") else [json.dumps({"n": 1, "text": text}) + "\n" for text in texts]
        with (gzip.open if kind.endswith("gz") else open)(path, "wt", encoding="utf-8", newline="") as file:
            file.write("".join(lines))
    return path


def open_stream(path, tokenizer, shuffle_buffer_size=0, **more):
    validation_file = Path(glob.glob(str(path))[0]).with_name("validation.txt")
    validation_file.write_text("a row\n")
    settings = Settings(
        train_file=str(path),
        validation_file=str(validation_file),
        streaming=True,
        max_train_steps=9,
        shuffle_buffer_size=shuffle_buffer_size,
        block_size=T,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **more,
    )
    return streaming.Stream(sources.load_source(settings)[0], tokenizer, settings), settings


def windows_of(stream, settings, position=None, accelerator=ALONE):
    """The windows of `position`'s epoch from there on, each with the position that the loop has after it, as JSON."""
    position = position or Position()
    for window in stream.windows(dataclasses.replace(position), settings, accelerator):
        position.move_to(window.end)
        yield window.tensors, json.dumps(vars(position))


def blocks_of(windows):
    """[n, T]: the blocks of windows, without those that fill up the last one."""
    blocks = [block for window, _ in windows for block in zip(*window.values(), strict=True)]
    input_ids = torch.cat([ids for ids, _ in blocks]).numpy()
    return input_ids[torch.cat([labels for _, labels in blocks])[:, 0].numpy() != data.IGNORED]


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "csv", "parquet"])
def test_streamed_blocks_are_the_prepared_ones_in_their_order(kind, texts, tokenizer, tmp_path):
    path = write(kind, tmp_path, texts)
    eos = kind != "txt" and kind != "txt.gz"
    rows, _, _ = load_rows(Settings(train_file=str(path), validation_file=str(path)))
    prepared = data.load_split(rows, tokenizer, "training", Settings(block_size=T, add_eos_token=eos))
    stream, settings = open_stream(path, tokenizer, add_eos_token=eos)
    assert len(list(stream.source.chunks(None))) > 20, "the text should have many chunks"
    np.testing.assert_array_equal(blocks_of(windows_of(stream, settings)), prepared.blocks)
    stream, settings = open_stream(path, tokenizer, add_eos_token=eos, max_train_samples=21)
    np.testing.assert_array_equal(blocks_of(windows_of(stream, settings)), prepared.blocks[:21])


def test_a_pattern_names_several_files_that_are_read_as_one(texts, tokenizer, tmp_path):
    for name, part in (("b", texts[100:]), ("a", texts[:100])):
        (tmp_path / name).mkdir()
        write("jsonl", tmp_path / name, part)
    whole, settings = open_stream(write("jsonl", tmp_path, texts), tokenizer)
    parts, _ = open_stream(f"{tmp_path}/*/rows.jsonl", tokenizer)
    assert "2 files" in parts.summary()
    np.testing.assert_array_equal(blocks_of(windows_of(parts, settings)), blocks_of(windows_of(whole, settings)))


def test_of_several_text_files_each_is_a_row_as_in_prepared_data(texts, tokenizer, tmp_path):
    for name, part in (("b", texts[100:]), ("a", texts[:100])):
        (tmp_path / name).mkdir()
        write("txt", tmp_path / name, part)
    pattern = f"{tmp_path}/*/rows.txt"
    rows, _, _ = load_rows(Settings(train_file=pattern, validation_file=pattern))
    prepared = data.load_split(rows, tokenizer, "training", Settings(block_size=T, add_eos_token=True))
    stream, settings = open_stream(pattern, tokenizer, add_eos_token=True)
    np.testing.assert_array_equal(blocks_of(windows_of(stream, settings)), prepared.blocks)


def test_each_block_is_seen_once_an_epoch_in_an_order_of_its_own(texts, tokenizer, tmp_path):
    path = write("txt", tmp_path, texts)
    plain = blocks_of(windows_of(*open_stream(path, tokenizer)))
    stream, settings = open_stream(path, tokenizer, shuffle_buffer_size=50)
    first, again, second = (blocks_of(windows_of(stream, settings, Position(epoch=epoch))) for epoch in (0, 0, 1))
    assert (first == again).all() and (first != second).any() and (first != plain).any()
    for epoch in (first, second):  # a group holds its own blocks and no others
        for group in range(0, len(plain), 50):
            assert sorted(map(tuple, epoch[group : group + 50])) == sorted(map(tuple, plain[group : group + 50]))
    settings.seed += 1
    assert (blocks_of(windows_of(stream, settings)) != first).any()


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("size", [0, 30])
def test_every_place_leads_to_the_same_windows_whatever_the_size_of_a_chunk(
    kind, size, texts, tokenizer, tmp_path, monkeypatch
):
    stream, settings = open_stream(write(kind, tmp_path, texts[:150]), tokenizer, size)
    position = Position(epoch=1, per_epoch=None)
    windows = list(windows_of(stream, settings, position))
    assert position.per_epoch == len(windows) > 30
    for k in range(1, len(windows) + 1, 7 if kind == "csv" or kind == "parquet" else 3):
        monkeypatch.setattr(sources, "CHUNK_BYTES", 100 + 37 * k)
        rest = list(windows_of(stream, settings, Position(**json.loads(windows[k - 1][1]))))
        assert len(rest) == len(windows) - k
        for (got, _), (expected, _) in zip(rest, windows[k:], strict=True):
            assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_text_file_is_not_read_again_before_the_place(texts, tokenizer, tmp_path):
    path = write("txt", tmp_path, texts)
    stream, settings = open_stream(path, tokenizer, shuffle_buffer_size=10)
    windows = list(windows_of(stream, settings))
    before = path.stat()
    with open(path, "r+b") as file:  # no longer text, but the file says that it is as it was
        file.write(b"\xff" * (before.st_size // 2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    k = len(windows) * 9 // 10
    rest = blocks_of(windows_of(stream, settings, Position(**json.loads(windows[k - 1][1]))))
    np.testing.assert_array_equal(rest, blocks_of(windows[k:]))
    with pytest.raises(ValueError, match="line 1: it is not UTF-8"):
        next(windows_of(stream, settings))


@pytest.mark.parametrize("how, said", [("changed", "changed during the run"), ("gone", "cannot be read")])
@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_a_file_that_changes_or_vanishes_is_named(kind, how, said, texts, tokenizer, tmp_path):
    path = write(kind, tmp_path, texts)
    stream, settings = open_stream(path, tokenizer)
    windows = windows_of(stream, settings)
    next(windows)
    path.unlink() if how == "gone" else write(kind, tmp_path, [*texts[:-1], "another end\n"])
    with pytest.raises(ValueError, match=f"training file .*{path.name} {said}"):
        list(windows)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_no_chunk_comes_from_a_file_once_it_has_changed(kind, texts, tokenizer, tmp_path):
    path = write(kind, tmp_path, texts)
    chunks = open_stream(path, tokenizer)[0].source.chunks(None)
    next(chunks)
    os.utime(path, ns=(0, 0))  # as an editor would that saves: written at another time
    with pytest.raises(ValueError, match=f"training file .*{path.name} changed during the run"):
        next(chunks)


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"text": "a b"}\n' * 40 + '{"text": "a b\n', "line 41: Unterminated string starting at column 10"),
        ('{"text": "a b"}\n' * 40 + '{"text": null}\n', "line 41: 'text' is null"),
        ('[\n{"text": "a b"}\n]', "is one JSON array; streaming reads JSON of one object a line"),
        ('{"a": "1", "b": "2"}\n', "not just one column of text; text_column may be one of: a, b"),
        ('{"text": "a"}\n', "less than one block of 16 tokens"),
    ],
)
def test_json_that_cannot_be_read_is_an_error_that_says_where(content, said, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        list(windows_of(*open_stream(path, tokenizer)))


def test_a_null_in_a_table_is_an_error(texts, tokenizer, tmp_path):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": [*texts, None]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"rows\.parquet, row 304: 'text' is null"):
        list(windows_of(*open_stream(path, tokenizer)))


@pytest.mark.parametrize(
    "change, said",
    [
        ("--max_train_steps=", "max_train_steps"),
        ("--tokenizer_vocab_size=300", "streaming needs a tokenizer"),
        ("--validation_file=", "streaming needs validation_file"),
        ("--streaming=false", "shuffle_buffer_size needs streaming"),
        ("--train_file=*.nothing", "*.nothing: there is no text file in it"),
    ],
)
def test_settings_that_do_not_go_with_streaming_are_refused(change, said, text_file):
    name = change.split("=")[0]
    words = ["--model_type=gpt2", "--output_dir=o", "--streaming", "--shuffle_buffer_size=7", "--max_train_steps=5"]
    words += ["--tokenizer_name=t", f"--train_file={text_file}", f"--validation_file={text_file}"]
    words = [
        word
        for word in words
        if not word.startswith(name) and not (name in change and "vocab" in name and word == "--tokenizer_name=t")
    ]
    with pytest.raises(ValueError) as error:
        read_settings([*words, change] if change.split("=")[1] else words)
    assert said in str(error.value)


@pytest.fixture(scope="module")
def arguments(texts, tokenizer, tmp_path_factory):
    """40 steps of 8 blocks of 32, more than two epochs, with dropout; checkpoints every 10 steps."""
    folder = tmp_path_factory.mktemp("streamed")
    tokenizer.save_pretrained(folder / "tokenizer")
    return [
        "--model_type=gpt2",
        "--config_overrides=n_layer=1,n_head=2,n_embd=32,n_positions=64",
        f"--tokenizer_name={folder}/tokenizer",
        f"--train_file={write('txt', folder, texts[:101])}",
        f"--validation_file={write('jsonl', folder, texts[200:])}",
        "--streaming",
        "--shuffle_buffer_size=50",
        "--max_train_steps=40",
        "--block_size=32",
        "--learning_rate=1e-3",
        "--max_eval_samples=30",
        "--logging_steps=3",
        "--checkpointing_steps=10",
        "--checkpoints_total_limit=9",
        "--num_threads=1",
    ]


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
    """The streamed run that was left alone."""
    output_dir = tmp_path_factory.mktemp("reference") / "run"
    assert main([*arguments, f"--output_dir={output_dir}"]) == 0
    assert lines_of(output_dir)[-1]["epoch"] > 2
    return output_dir


def test_the_checkpoint_of_every_step_of_a_stream_leads_to_the_same_end(arguments, reference, tmp_path):
    for step in steps_in(reference / "checkpoints")[:-1]:
        copy_until(step, reference, tmp_path / str(step))
        assert main([*arguments, f"--output_dir={tmp_path}/{step}", "--resume_from_checkpoint=auto"]) == 0
        assert_same_run(tmp_path / str(step), reference)


@pytest.mark.parametrize("processes, kills", [(1, 4), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_streamed_run_killed_at_random_instants_ends_as_if_left_alone(processes, kills):
    """The short form of tests/benchmarks/kills.py, which compares weights and metrics bit for bit."""
    harness = "tests/benchmarks/kills.py"
    done = forked(harness, "--streaming", f"--kills={kills}", f"--processes={processes}", timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == kills and counts["equal"] == counts["runs"] > 0


def test_two_processes_resume_the_stream_of_one(arguments, tmp_path):
    """In the second epoch, within a group; without dropout equal to rounding. Each tokenises every second chunk."""
    arguments = [*arguments, NO_DROPOUT, "--per_device_train_batch_size=4"]
    assert main([*arguments, "--gradient_accumulation_steps=2", f"--output_dir={tmp_path}/one"]) == 0
    copy_until(20, tmp_path / "one", tmp_path / "two")
    more = [f"--output_dir={tmp_path}/two", "--resume_from_checkpoint=auto"]
    done = forked(PROGRAMS / "small_chunks.py", *arguments, *more, processes=2)
    assert done.returncode == 0, done.stderr
    assert "the checkpoint is of 1 process, " in done.stderr
    assert_lines_agree(without_timings(tmp_path / "two"), without_timings(tmp_path / "one"), rel=1e-4)


def test_a_process_that_cannot_read_its_share_stops_both_with_one_sentence(arguments, texts, tmp_path):
    """It is the second process: the second chunk is its share."""
    path = write("txt", tmp_path, texts)
    content = bytearray(path.read_bytes())
    content[700] = 0xFF
    path.write_bytes(content)
    more = [f"--train_file={path}", f"--output_dir={tmp_path}/run", "--ddp_timeout=60"]
    done = forked(PROGRAMS / "small_chunks.py", *arguments, *more, processes=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "it is not UTF-8 text" in errors[0], done.stderr


@pytest.mark.parametrize(
    "change, said",
    [
        ("--shuffle_buffer_size=51", "belongs to a different run (checkpoint -> now): shuffle_buffer_size: 50 -> 51"),
        ("--block_size=16", "belongs to a different run (checkpoint -> now): training blocks: streamed"),
        ("--train_file={other}", "belongs to a different run (checkpoint -> now): training data"),
        ("--train_file={copy}", "training files' times of change: "),
        ("--streaming=false", "belongs to a different run (checkpoint -> now): training blocks"),
    ],
)
def test_another_stream_is_refused(change, said, arguments, reference, texts, tmp_path, capsys):
    copy_until(20, reference, tmp_path / "run")
    (tmp_path / "copy").mkdir()
    places = {"other": write("txt", tmp_path, texts[:100]), "copy": write("txt", tmp_path / "copy", texts[:101])}
    words = [*arguments, change.format(**places), f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=auto"]
    if "streaming" in change:
        words.remove("--shuffle_buffer_size=50")
    assert main(words) == 1
    assert said in capsys.readouterr().err
    if "copy" in change:  # the same content: on request
        assert main([*words, "--resume_with_changes"]) == 0
        assert_same_run(tmp_path / "run", reference)


def test_the_hub_and_a_folder_give_the_same_stream_and_both_resume(arguments, texts, tmp_path):
    """The hub is one on loopback; half of the text's files are read when the run is interrupted."""
    folder = tmp_path / "set"
    folder.mkdir()
    parts = {"train-0": texts[:50], "train-1": texts[50:101], "validation": texts[200:]}
    for name, part in parts.items():
        write("parquet", folder, part).rename(folder / f"{name}.parquet")
    words = [*(word for word in arguments if "_file=" not in word), "--max_train_steps=20"]
    with HubServer(tmp_path / "hub", {}) as hub:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.add("datasets", "me/prose", files)
        environment = hub.environment(tmp_path / "cache")
        words_there = [*words, "--dataset_name=me/prose", tmp_path]
        done = run_program("streams_twice.py", *words_there, launcher=(*ONLINE, sys.executable), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "streamed from 2 files on the hub" in done.stdout
    assert main([*words, f"--dataset_name={folder}", f"--output_dir={tmp_path}/local"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "local")
    assert_same_run(tmp_path / "resumed", tmp_path / "local")
