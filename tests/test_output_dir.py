"""One output_dir has one living run, and what a run did not make is safe from it."""

import json
import os
import re
import shutil
import signal
import socket
import threading
import time

import pytest
import yaml
from conftest import EXPORTED, PROGRAMS, TINY, largest_file, lines_of
from forks import forked

from train_loop import lock
from train_loop.errors import UserError
from train_loop.main import main


@pytest.fixture(scope="module")
def arguments(text_file):
    return [*TINY, f"--train_file={text_file}", "--max_train_steps=2"]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([*arguments, f"--output_dir={folder}"]) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A finished run, to be spoilt."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def content(folder):
    """{path: (time of its last change, what is in it)} of everything in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def fork(action):
    """The process number of a child that starts its action and waits to be killed. It has begun when this returns."""
    done, told = os.pipe()
    if not (pid := os.fork()):
        with action():
            os.write(told, b"!")
            time.sleep(600)
        os._exit(0)
    assert os.read(done, 1) == b"!"
    os.close(done), os.close(told)
    return pid


def test_of_two_runs_that_start_at_the_same_moment_one_trains_and_the_other_refuses(arguments, finished, tmp_path):
    """The short form of tests/benchmarks/two_at_once.py."""
    done = forked(PROGRAMS / "at_once.py", tmp_path, *arguments, f"--output_dir={tmp_path}/run")
    assert done.stdout == "[0, 1]\n", done.stdout + done.stderr
    (error,) = [line for path in tmp_path.glob("*.err") for line in path.read_text().splitlines() if "error" in line]
    # a refused run waits a second for the lock, in which a run as short as this one may end
    is_used = f"is used by another run: process .* on host {re.escape(socket.gethostname())}, since 20"
    assert re.search(f"output_dir {re.escape(str(tmp_path))}/run ({is_used}|is not empty: choose a different)", error)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [line["step"] for line in lines_of(finished)]
    assert {path.name for path in (tmp_path / "run").iterdir()} == EXPORTED | {"checkpoints"}


def test_a_second_run_changes_nothing_while_the_first_one_lives_or_is_frozen(arguments, copied, capsys):
    pid = fork(lambda: lock.held(copied))
    before = content(copied)
    try:
        for more in ["--resume_from_checkpoint=auto"], ["--overwrite_output_dir"]:
            assert main([*arguments, *more, f"--output_dir={copied}"]) == 1
            assert f"is used by another run: process {pid} on host" in capsys.readouterr().err
        os.kill(pid, signal.SIGSTOP)
        assert main([*arguments, "--resume_from_checkpoint=auto", f"--output_dir={copied}"]) == 1
        assert content(copied) == before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    # a dead holder leaves its file, and blocks nobody
    assert (copied / ".lock").exists()
    assert main([*arguments, "--overwrite_output_dir", f"--output_dir={copied}"]) == 0
    assert not (copied / ".lock").exists()


def test_a_child_that_outlives_a_run_does_not_hold_its_lock(tmp_path):
    def holder_with_a_child():
        held = lock.held(tmp_path)
        held.__enter__()
        if not os.fork():
            time.sleep(3)
            os._exit(0)
        return held

    class Entered:
        def __enter__(self):
            self.held = holder_with_a_child()

        def __exit__(self, *error):
            pass

    pid = fork(Entered)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_run_that_its_launcher_starts_again_waits_for_the_one_before_it(tmp_path, monkeypatch):
    pid = fork(lambda: lock.held(tmp_path))
    killer = threading.Timer(lock.PATIENCE + 0.3, os.kill, (pid, signal.SIGKILL))
    try:
        with pytest.raises(UserError, match=f"process {pid}"), lock.held(tmp_path):  # after PATIENCE
            pass
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        killer.start()
        with lock.held(tmp_path):
            pass
    finally:
        killer.cancel()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_run_that_fails_before_it_begins_leaves_no_folder(arguments, tmp_path, capsys):
    assert main([*arguments, "--config_overrides=n_head=nonsense", f"--output_dir={tmp_path}/a/b"]) == 1
    assert "config_overrides" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", [".lock", ".train_config.yaml.partial", ".export.partial/model.safetensors"])
def test_what_a_kill_or_a_full_disk_left_does_not_keep_the_same_command_out(name, arguments, tmp_path):
    left = tmp_path / "run" / name
    left.parent.mkdir(parents=True)
    left.write_text("half of i")
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == EXPORTED | {"checkpoints"}


def test_a_full_disk_at_the_first_file_is_a_sentence_and_leaves_nothing(arguments, tmp_path, capsys):
    with largest_file(200):
        assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 1
    assert f"error: {tmp_path}/run/train_config.yaml cannot be written: File too large\n" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0


@pytest.mark.parametrize("name", ["train_file", "validation_file", "model_name_or_path", "tokenizer_name"])
def test_overwriting_spares_the_inputs_of_the_run(name, arguments, copied, text_file, capsys):
    inputs = {"train_file": copied / "prose.txt", "validation_file": copied / "prose.txt"}
    shutil.copy(text_file, copied / "prose.txt")
    arguments = [*arguments, f"--{name}={inputs.get(name, copied)}", "--overwrite_output_dir"]
    if name in ("model_name_or_path", "tokenizer_name"):
        arguments = [a for a in arguments if not a.startswith(("--tokenizer_vocab_size", "--model_type", "--config_o"))]
        arguments += ["--model_type=gpt2"] if name == "tokenizer_name" else []
    before = content(copied)
    assert main([*arguments, f"--output_dir={copied}"]) == 1
    assert f"{name} {inputs.get(name, copied)} is in output_dir {copied}" in capsys.readouterr().err
    assert content(copied) == before


def test_overwriting_removes_all_that_a_run_made_and_nothing_else(arguments, copied, finished, capsys):
    for name in ("notes.txt", "vocab.json"):  # the second has a name that some tokenizers' files have
        (copied / name).write_text("years")
    (copied / "checkpoints" / "step-000002.copy").mkdir()
    (copied / "tensorboard").mkdir()
    assert main([*arguments, "--max_train_steps=1", "--overwrite_output_dir", f"--output_dir={copied}"]) == 0
    assert (
        f"files in {copied} that no run made are kept: checkpoints, notes.txt, vocab.json\n" in capsys.readouterr().err
    )
    assert {path.name for path in copied.iterdir()} == EXPORTED | {"checkpoints", "notes.txt", "vocab.json"}
    assert {path.name for path in (copied / "checkpoints").iterdir()} == {"step-000001", "step-000002.copy"}


def test_a_name_that_is_not_utf8_is_written_with_its_byte_escaped(arguments, text_file, tmp_path, capsys):
    text = tmp_path / os.fsdecode(b"caf\xe9.txt")
    shutil.copy(text_file, text)
    assert main([*arguments, f"--train_file={text}", f"--output_dir={tmp_path}/run"]) == 0
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert r"on caf\xe9.txt." in card and r"name: caf\xe9.txt" in card and "udc" not in card.lower()
    assert yaml.safe_load((tmp_path / "run" / "train_config.yaml").read_text())["train_file"] == str(text)
    output_dir = str(tmp_path / os.fsdecode(b"r\xe9sum\xe9"))
    assert main([*arguments, f"--output_dir={output_dir}"]) == 1  # safetensors could not read it
    assert rf"error: output_dir {tmp_path}/r\xe9sum\xe9 is not UTF-8" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {text.name, "run"}
