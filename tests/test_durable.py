"""Finished means that the exported files are this run's; no record keeps a whole checkpoint from being resumed."""

import json
import shutil

import pytest
from accelerate import Accelerator
from conftest import EXPORTED, TINY, assert_same_run, copy_until
from forks import forked
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from train_loop import loop
from train_loop.checkpoint.durable import digest_of_manifest, steps_in
from train_loop.main import main
from train_loop.publish import Publisher, push
from train_loop.publish.model_card import model_card
from train_loop.settings import Settings


@pytest.fixture(scope="module")
def arguments(text_file):
    """6 steps, a checkpoint and an evaluation after every second one."""
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=6", "--checkpointing_steps=2", "--eval_steps=2"]
    return [*arguments, "--logging_steps=1", "--checkpoints_total_limit=9"]


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert main([*arguments, f"--output_dir={folder}"]) == 0
    return folder


@pytest.fixture
def finished(reference, tmp_path):
    """A finished run, to be spoilt."""
    shutil.copytree(reference, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def interrupted(reference, tmp_path):
    """The run as a kill after step 4 would have left it."""
    copy_until(4, reference, tmp_path / "interrupted")
    return tmp_path / "interrupted"


@pytest.fixture
def resume(arguments):
    """Runs the same command again; its exit status."""
    return lambda folder, *more: main([*arguments, f"--output_dir={folder}", "--resume_from_checkpoint=auto", *more])


def exported(folder):
    names = EXPORTED - {
        "README.md",
        "all_results.json",
        "evaluations",
        "loss_curve.png",
        "metrics.jsonl",
        "train_config.yaml",
    }
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


@pytest.mark.parametrize(
    "name, deed",
    [
        ("model.safetensors", "missing"),
        ("model.safetensors", "foreign"),
        ("config.json", "cut"),
        ("generation_config.json", "missing"),
        ("tokenizer.json", "cut"),
    ],
)
def test_a_finished_run_with_damaged_exported_files_is_exported_again(name, deed, finished, reference, resume, capsys):
    path = finished / name
    content = {"missing": None, "cut": path.read_bytes()[:-1], "foreign": b"x" * path.stat().st_size}[deed]
    path.unlink() if content is None else path.write_bytes(content)
    assert resume(finished) == 0
    assert f"the model in {finished} is exported again: {name} " in capsys.readouterr().out
    assert exported(finished) == exported(reference)
    assert resume(finished) == 0
    assert "is finished: 6 steps" in capsys.readouterr().out


def test_a_damaged_model_without_checkpoints_is_a_sentence(finished, resume, capsys):
    shutil.rmtree(finished / "checkpoints")
    (finished / "model.safetensors").unlink()
    assert resume(finished) == 1
    said = capsys.readouterr().err
    assert "holds a finished run without checkpoints" in said
    assert "model.safetensors is missing. --overwrite_output_dir starts again from the beginning" in said


def test_a_run_resumed_with_changes_is_unfinished_until_it_is_exported_again(finished, reference, resume, capsys):
    """Its export fails: the same command must not say that it is finished, with the old model in the folder."""
    changed = "--learning_rate=5e-3", "--resume_with_changes"
    (finished / "model.safetensors").unlink()
    (finished / "model.safetensors").mkdir()
    assert resume(finished, *changed, f"--resume_from_checkpoint={finished}/checkpoints/step-000004") == 1
    assert "the model cannot be exported" in capsys.readouterr().err
    assert not (finished / "all_results.json").exists()
    (finished / "model.safetensors").rmdir()
    shutil.copy(reference / "model.safetensors", finished)
    assert resume(finished, *changed) == 0
    assert "is finished" not in capsys.readouterr().out
    assert (finished / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes()


def test_files_that_changed_since_the_run_are_not_pushed(finished, capsys):
    (finished / "config.json").write_text("{}")
    push(Settings(output_dir=str(finished)), "me/mine", None)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: not pushed: {finished} changed since the run ended: config.json has 2 bytes")


DAMAGED_RECORDS = {
    "lost": None,
    "emptied": b"",
    "a damaged line": b'{"step": 0, "epo\n[1\n',
    "of another run": b'{"step": 7, "loss": 1.0}\n',
    "no text": b"\xff\xfe\x00",
    "no object": b"[17]",
    "deep": b"[" * 100_000,
    "of other types": b'{"step": "six", "eval_loss": "low", "files": [], "exported": [[]], "blake2b": 1}',
}


def spoil(path, content):
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("damage", ["lost", "emptied", "a damaged line", "of another run", "no text"])
def test_metrics_that_are_lost_or_damaged_come_back_from_the_checkpoint(damage, interrupted, reference, resume, capsys):
    spoil(interrupted / "metrics.jsonl", DAMAGED_RECORDS[damage])
    assert resume(interrupted) == 0
    warning = f"warning: {interrupted}/metrics.jsonl is damaged from line 1 on: its lines come from the checkpoint\n"
    assert (warning in capsys.readouterr().err) == (damage != "lost")
    assert_same_run(interrupted, reference)


def test_a_checkpoint_is_resumed_in_another_folder(arguments, reference, tmp_path):
    more = [f"--output_dir={tmp_path}/new", f"--resume_from_checkpoint={reference}/checkpoints/step-000004"]
    assert main([*arguments, *more]) == 0
    assert_same_run(tmp_path / "new", reference)


@pytest.mark.parametrize("damage", ["emptied", "no object", "deep", "of other types"])
@pytest.mark.parametrize("name", ["all_results.json", "checkpoints/step-000002/manifest.json"])
def test_no_damaged_record_keeps_a_run_from_its_end(name, damage, interrupted, reference, resume):
    (interrupted / name).touch()
    spoil(interrupted / name, DAMAGED_RECORDS[damage])
    assert resume(interrupted, "--checkpoints_total_limit=2") == 0
    assert_same_run(interrupted, reference)


@pytest.mark.parametrize("change", [{"step": "two"}, {"eval_loss": "low"}, {"best_step": {}}, {"files": []}], ids=str)
def test_a_manifest_with_values_of_wrong_types_is_skipped(change, interrupted, reference, resume):
    path = interrupted / "checkpoints" / "step-000002" / "manifest.json"
    manifest = json.loads(path.read_text()) | change
    path.write_text(json.dumps(manifest | {"blake2b": digest_of_manifest(manifest)}))
    assert resume(interrupted, "--checkpoints_total_limit=2") == 0
    assert_same_run(interrupted, reference)


def test_a_card_without_evaluations_is_a_card(arguments, finished):
    settings, accelerator = Settings(output_dir=str(finished), train_file="prose.txt"), Accelerator(cpu=True)
    publisher = Publisher(settings, None, accelerator, None, "", "AdamW")
    model = AutoModelForCausalLM.from_pretrained(finished)
    card = model_card(publisher, model, [{"step": 1, "epoch": 0.1, "loss": 5.0}])
    assert "There is no record of an evaluation." in card and ModelCard(card).data.library_name == "transformers"


@pytest.mark.parametrize("name", ["model_backup.safetensors", "model-00001-of-00002.safetensors"])
def test_a_stray_file_in_a_checkpoint_is_not_read(name, interrupted, reference, resume):
    path = interrupted / "checkpoints" / "step-000004"
    tensors = {name: tensor * 0 for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / name)
    assert resume(interrupted) == 0
    assert_same_run(interrupted, reference)


def test_the_step_of_a_renamed_checkpoint_is_its_manifests(interrupted, reference, resume, capsys):
    checkpoints = interrupted / "checkpoints"
    (checkpoints / "step-000002").rename(checkpoints / "step-000099")
    assert steps_in(checkpoints) == [2, 4]
    assert resume(interrupted) == 0
    assert f"resuming    {checkpoints}/step-000004\n" in capsys.readouterr().out
    assert steps_in(checkpoints) == [2, 4, 6]
    assert_same_run(interrupted, reference)


def test_newer_checkpoints_stay_until_an_older_one_that_is_resumed_has_a_successor(
    finished, reference, resume, monkeypatch
):
    steps = []

    def evaluate(*arguments):
        steps.append(steps_in(finished / "checkpoints"))
        return plain(*arguments)

    plain = loop.evaluate_splits
    monkeypatch.setattr(loop, "evaluate_splits", evaluate)  # it comes before the save
    assert resume(finished, f"--resume_from_checkpoint={finished}/checkpoints/step-000002") == 0
    assert steps == [[2, 4, 6], [2, 4]]
    assert_same_run(finished, reference)


def test_a_kill_in_the_last_rotation_leaves_nothing_superfluous(finished, reference, resume):
    (finished / "all_results.json").unlink()
    checkpoints = finished / "checkpoints"
    (checkpoints / "step-000002").rename(checkpoints / "step-000002.discarded")
    assert resume(finished, "--checkpoints_total_limit=1") == 0
    assert {path.name for path in checkpoints.iterdir()} == {"step-000006"}
    assert_same_run(finished, reference)


def test_a_checkpoints_files_have_the_mode_of_any_new_file(reference, tmp_path):
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in reference.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("more", [["--every=60"], ["--every=30", "--full_disk"]])
def test_a_run_that_is_struck_at_an_event_in_its_folder_ends_as_if_left_alone(more):
    """The short form of tests/benchmarks/events.py, which strikes at each of them."""
    done = forked("tests/benchmarks/events.py", "--seconds=60", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["equal"] == counts["runs"] > 0 and counts["struck"] > 0


def test_a_run_whose_files_are_damaged_ends_in_a_sentence_or_right():
    """The short form of tests/benchmarks/damages.py, which tries each file and each damage."""
    done = forked("tests/benchmarks/damages.py", "--states=6", "--seconds=60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["states"] > 0
