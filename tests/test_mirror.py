"""Copies of checkpoints at another place: whole or not counted, and the way back from them."""

import json
import re
import shutil
import time
from pathlib import Path

import fsspec
import pytest
from conftest import TINY, assert_same_run
from fsspec.implementations.memory import MemoryFileSystem

from train_loop.checkpoint.durable import damage, digest_of_manifest, steps_in
from train_loop.main import main


class Slow(MemoryFileSystem):
    """A store in memory that takes no file before the run's model is exported, or five seconds are over."""

    protocol = "slow"

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("slow://", "memory://").replace("lossy://", "memory://"))

    def put_file(self, path, address, **options):
        for _ in range(500):
            if not (Path(path).parents[2] / "all_results.json").exists():
                time.sleep(0.01)
        super().put_file(path, address, **options)


class Lossy(MemoryFileSystem):
    """A store that keeps half of a file, and says nothing."""

    protocol = "lossy"
    _strip_protocol = Slow._strip_protocol

    def put_file(self, path, address, **options):
        super().put_file(path, address, **options)
        self.pipe_file(address, self.cat_file(address)[:-9])


fsspec.register_implementation("slow", Slow, clobber=True)
fsspec.register_implementation("lossy", Lossy, clobber=True)


@pytest.fixture(autouse=True)
def emptied():
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def arguments(text_file):
    """4 steps with dropout, a checkpoint at each, the three newest kept; the best is not the last."""
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=4", "--checkpointing_steps=1", "--eval_steps=2"]
    return [*arguments, "--resume_from_checkpoint=auto"]


@pytest.fixture(scope="module")
def mirrored(arguments, tmp_path_factory):
    """A run that was left alone, and its mirror beside it. Every checkpoint is still there."""
    folder = tmp_path_factory.mktemp("mirrored")
    command = [*arguments, f"--output_dir={folder}/run", "--checkpoints_total_limit=9"]
    for step in range(1, 5):  # a run ends when its copies are made: none is left out
        time_is_up = ["--max_minutes=1e-6"] if step < 4 else []
        assert main([*command, f"--mirror={folder}/mirror", *time_is_up]) == 0
    return folder


@pytest.fixture
def place(mirrored, tmp_path):
    """A folder with the mirror alone, as it is when the machine with output_dir is lost after step 3."""
    shutil.copytree(mirrored / "mirror", tmp_path / "mirror")
    shutil.rmtree(tmp_path / "mirror" / "step-000004")
    return tmp_path


def test_a_copy_is_the_checkpoint_byte_for_byte(mirrored):
    for step in range(1, 5):
        own, copy = (mirrored / name / f"step-{step:06d}" for name in ("run/checkpoints", "mirror"))
        assert damage(copy) is None
        files = {path.name: path.read_bytes() for path in own.iterdir()}
        assert files == {path.name: path.read_bytes() for path in copy.iterdir()}


def test_a_run_whose_folder_is_lost_is_resumed_from_the_mirror(arguments, place, mirrored, capsys):
    assert main([*arguments, f"--output_dir={place}/run", f"--mirror={place}/mirror"]) == 0
    told = capsys.readouterr()
    assert "step-000003 was fetched from the mirror" in told.err
    assert f"resuming    {place}/run/checkpoints/step-000003" in told.out
    assert_same_run(place / "run", mirrored / "run")


def test_a_store_in_memory_is_a_mirror_too_and_rotates_as_the_folder_does(arguments, tmp_path, mirrored):
    command = [*arguments, "--mirror=memory://bucket/run", "--checkpoints_total_limit=1"]
    for _ in range(3):
        assert main([*command, f"--output_dir={tmp_path}/run", "--max_minutes=1e-6"]) == 0
        shutil.rmtree(tmp_path / "run")
    copies = ["/bucket/run/step-000002", "/bucket/run/step-000003"]  # the best, and the newest
    assert MemoryFileSystem().ls("/bucket/run", detail=False) == copies
    assert main([*command, f"--output_dir={tmp_path}/run"]) == 0
    assert_same_run(tmp_path / "run", mirrored / "run")
    assert MemoryFileSystem().ls("/bucket/run", detail=False) == ["/bucket/run/step-000004"]


def test_the_best_model_comes_from_the_mirror_with_the_newest(arguments, tmp_path):
    best = ["--load_best_model_at_end", "--learning_rate=0", "--checkpoints_total_limit=1"]  # the first stays the best
    command = [*arguments, *best, "--mirror=memory://best", f"--output_dir={tmp_path}/run"]
    for _ in range(3):
        assert main([*command, "--max_minutes=1e-6"]) == 0
    shutil.rmtree(tmp_path / "run")
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["exported_step"] == 2
    assert steps_in(tmp_path / "run" / "checkpoints") == [2, 4]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("spoil", [flip, lambda path: path.unlink()], ids=["flipped", "missing"])
def test_a_damaged_copy_is_not_taken(name, spoil, arguments, place, mirrored, capsys):
    spoil(place / "mirror" / "step-000003" / name)
    assert main([*arguments, f"--output_dir={place}/run", f"--mirror={place}/mirror"]) == 0
    assert "step-000002 was fetched" in capsys.readouterr().err
    assert_same_run(place / "run", mirrored / "run")


def test_a_file_of_a_copy_is_written_nowhere_but_in_its_folder(arguments, place, capsys):
    path = place / "mirror" / "step-000003" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../outside.txt"] = {"size": 1, "blake2b": "00"}
    path.write_text(json.dumps({**manifest, "blake2b": digest_of_manifest(manifest)}))
    (place / "outside.txt").write_text("the mirror's")
    assert main([*arguments, f"--output_dir={place}/deep/run", f"--mirror={place}/mirror"]) == 0
    assert "step-000003 is damaged" in capsys.readouterr().err
    assert not list((place / "deep").rglob("outside.txt"))


def test_complete_checkpoints_in_the_folder_win_over_the_mirror(arguments, place, mirrored, capsys):
    shutil.copytree(mirrored / "run", place / "run")
    for step in (3, 4):
        shutil.rmtree(place / "run" / "checkpoints" / f"step-00000{step}")
    assert main([*arguments, f"--output_dir={place}/run", f"--mirror={place}/mirror"]) == 0
    assert "fetched" not in capsys.readouterr().err


def test_a_folder_of_damaged_checkpoints_is_mended_from_the_mirror(arguments, place, mirrored):
    shutil.copytree(mirrored / "run", place / "run")
    for model in (place / "run" / "checkpoints").glob("*/model.safetensors"):
        flip(model)
    assert main([*arguments, f"--output_dir={place}/run", f"--mirror={place}/mirror"]) == 0
    assert_same_run(place / "run", mirrored / "run")


@pytest.mark.parametrize(
    "address, reason",
    [
        ("nosuch://bucket/run", "Protocol not known: nosuch"),
        ("{folder}/file.txt/mirror", "Not a directory"),
        ("lossy://run", "state.json was not stored as it was written"),
    ],
)
def test_a_mirror_that_fails_is_a_warning(address, reason, arguments, mirrored, tmp_path, capsys):
    (tmp_path / "file.txt").write_text("no folder")
    address = address.format(folder=tmp_path)
    assert main([*arguments, f"--output_dir={tmp_path}/run", f"--mirror={address}"]) == 0
    told = capsys.readouterr().err
    assert f"is not mirrored to {address}: " in told and reason in told
    assert_same_run(tmp_path / "run", mirrored / "run")


def test_a_bug_in_copying_is_a_warning_with_its_line(arguments, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train_loop.checkpoint.mirror.Mirror._copy", lambda *arguments: {}["files"])
    assert main([*arguments, f"--output_dir={tmp_path}/run", f"--mirror={place}"]) == 0
    told = capsys.readouterr().err
    assert re.search(r"is not mirrored to .*: KeyError: 'files' \(.*/checkpoint/mirror\.py, line \d+\)\n", told)


def test_training_does_not_wait_for_a_slow_mirror_but_the_end_of_the_run_does(arguments, mirrored, tmp_path, capsys):
    command = [*arguments, f"--output_dir={tmp_path}/run", "--mirror=slow://slow", "--checkpoints_total_limit=1"]
    assert main(command) == 0
    told = capsys.readouterr().err
    for step in (2, 3, 4):
        assert f"step-{step:06d} is not mirrored: the copy of step-000001 is still being made" in told
    assert "is not mirrored to" not in told
    assert MemoryFileSystem().ls("/slow", detail=False) == ["/slow/step-000004"]
    assert steps_in(tmp_path / "run" / "checkpoints") == [4]  # step 1 stayed only while it was read
    assert_same_run(tmp_path / "run", mirrored / "run")


def test_another_runs_copies_are_neither_overwritten_nor_removed_nor_resumed(arguments, place, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (place / "mirror").rglob("*") if path.is_file()}
    other = [*arguments, f"--output_dir={tmp_path}/other", f"--mirror={place}/mirror", "--seed=7"]
    assert main(other) == 1
    assert (
        f"{place}/mirror/step-000003 belongs to a different run (checkpoint -> now): seed: 42 -> 7"
        in capsys.readouterr().err
    )
    assert main([word for word in other if "resume" not in word]) == 0
    told = capsys.readouterr().err
    assert told.count("nothing is mirrored") == 1 and "Give --mirror a different address" in told
    assert {path: path.read_bytes() for path in (place / "mirror").rglob("*") if path.is_file()} == before


def test_a_password_in_the_address_is_not_printed(arguments, tmp_path, capsys):
    assert main([*arguments, f"--output_dir={tmp_path}/run", "--mirror=nosuch://me:secret@host/run"]) == 0
    told = capsys.readouterr()
    assert "not mirrored to nosuch://host/run" in told.err and "secret" not in told.err + told.out


def test_a_mirror_in_output_dir_is_refused(arguments, tmp_path, capsys):
    run = f"--output_dir={tmp_path}/run"
    assert main([*arguments, run, f"--mirror={tmp_path}/run/checkpoints"]) == 1
    assert "give it a different place" in capsys.readouterr().err
