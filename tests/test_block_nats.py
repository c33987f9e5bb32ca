"""The nats of each validation block: what an evaluation keeps of itself for `compare`."""

import itertools
import os
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import NO_DROPOUT, TINY, assert_same_run, copy_until, largest_file, lines_of, make_model

from train_loop.data.blocks import Split
from train_loop.errors import UserError
from train_loop.evaluate import evaluate, evaluate_splits
from train_loop.main import main
from train_loop.report.evaluations import BLOCK_NATS, read_block_nats, write_block_nats
from train_loop.settings.settings import Settings

T = 12
TOKENS = (np.arange(5 * T + 7) ** 2 * 7 % 97).astype(np.int32)
BLOCKS, TAIL = TOKENS[: 5 * T].reshape(5, T), TOKENS[5 * T :]


def nats_by_hand(model, tokens, targets):
    """[len(tokens)] of each token given those before it, 0 where it is no target."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor(tokens[None], dtype=torch.long)).logits[0].log_softmax(-1)
    return sum(-log_p[t - 1, tokens[t]].item() for t in targets)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_each_block_has_its_own_nats_in_order_whatever_the_batch(model_type):
    """Tolerance: float32 rounding of products of another shape."""
    model = make_model(model_type).eval()
    wanted = [nats_by_hand(model, block, range(1, T)) for block in BLOCKS]
    for batch_size in (1, 2, 64):
        settings = Settings(per_device_eval_batch_size=batch_size)
        result = evaluate(model, Split("validation", BLOCKS), settings, Accelerator(cpu=True))
        found = result.block_nats["validation"]
        assert found.nats.dtype == np.float32 and found.nats == pytest.approx(wanted, rel=1e-5)
        assert found.targets.tolist() == [T - 1] * 5
        assert found.nats.sum() / found.targets.sum() == pytest.approx(result["eval_loss"], rel=1e-6)


def test_with_a_stride_the_blocks_are_windows_and_count_what_is_new_in_them():
    model = make_model("llama").eval()
    settings = Settings(per_device_eval_batch_size=3, eval_stride=5)
    result = evaluate(model, Split("validation", BLOCKS, tail=TAIL), settings, Accelerator(cpu=True))
    found, begin = result.block_nats["validation"], 0
    for nats, num_targets in itertools.zip_longest(found.nats, found.targets):
        window = TOKENS[begin : begin + T]
        new = range(T - 5 if begin else 1, len(window))
        assert num_targets == len(new) and nats == pytest.approx(nats_by_hand(model, window, new), rel=1e-5)
        begin += 5
    assert begin - 5 + T >= len(TOKENS) > begin - 10 + T


def test_different_tokens_cuts_or_targets_make_different_blocks():
    model, accelerator = make_model(), Accelerator(cpu=True)
    changed = BLOCKS.copy()
    changed[4, 11] += 1

    def digest(blocks, stride=None, **fields):
        result = evaluate(model, Split("validation", blocks, **fields), Settings(eval_stride=stride), accelerator)
        return result.block_nats["validation"].blocks

    digests = [
        digest(BLOCKS),
        digest(changed),
        digest(BLOCKS[:4]),
        digest(BLOCKS.reshape(10, 6)),
        digest(BLOCKS, stride=3),
        digest(BLOCKS, stride=3, tail=TAIL),
        digest(BLOCKS, documents_apart=True),
    ]
    assert len(set(digests)) == 7 and digests[0] == digest(BLOCKS.copy())


def test_each_named_set_keeps_its_own():
    splits = {"validation": Split("validation", BLOCKS), "other": Split("anything", BLOCKS[1:3])}
    result = evaluate_splits(make_model(), splits, Settings(), Accelerator(cpu=True))
    assert list(result.block_nats) == ["validation", "other"]
    assert result.block_nats["other"].nats == pytest.approx(result.block_nats["validation"].nats[1:3], rel=1e-6)


@pytest.fixture(scope="module")
def run_folder(text_file, tmp_path_factory):
    """A run that soon gets worse: the last evaluation is not the best. (arguments, output_dir)"""
    folder = tmp_path_factory.mktemp("nats")
    arguments = [*TINY, NO_DROPOUT, f"--train_file={text_file}", "--max_train_samples=8", "--num_train_epochs=20"]
    arguments += ["--learning_rate=3e-2", "--eval_steps=4", "--checkpointing_steps=5", "--checkpoints_total_limit=9"]
    assert main([*arguments, f"--output_dir={folder}/run"]) == 0
    return arguments, folder / "run"


def test_a_run_keeps_its_last_and_its_best_evaluation(run_folder):
    _, folder = run_folder
    kept = read_block_nats(folder / BLOCK_NATS)
    losses = {line["step"]: line["eval_loss"] for line in lines_of(folder) if line.get("eval_loss") and line["step"]}
    best = min(losses, key=losses.get)
    assert (kept["last"].step, kept["best"].step) == (max(losses), best) and best != max(losses)
    for evaluation in kept.values():
        found = evaluation.sets["validation"]
        assert found.nats.sum() / found.targets.sum() == pytest.approx(losses[evaluation.step], rel=1e-6)


def test_a_resumed_run_keeps_the_same_bytes(run_folder, tmp_path):
    """From a checkpoint before the best evaluation and from one after it. The file on the disk is of later steps then,
    or missing."""
    arguments, reference = run_folder
    best = read_block_nats(reference / BLOCK_NATS)["best"].step
    for step in (best - best % 5, 15):
        copy_until(step, reference, tmp_path / f"{step}")
        if step == 15:
            shutil.rmtree(tmp_path / f"{step}" / "evaluations")
        resume = [f"--output_dir={tmp_path}/{step}", "--resume_from_checkpoint=auto"]
        assert main([*arguments, *resume]) == 0
        assert_same_run(tmp_path / f"{step}", reference)


def test_the_best_evaluation_is_dropped_if_the_validation_data_changed(run_folder, tmp_path):
    """A resume with changes allows other validation data. The best evaluation so far was made on other blocks then."""
    arguments, reference = run_folder
    copy_until(15, reference, tmp_path / "run")
    changed = ["--max_eval_samples=20", "--resume_with_changes", "--resume_from_checkpoint=auto"]
    assert main([*arguments, f"--output_dir={tmp_path}/run", *changed, "--eval_steps=99"]) == 0
    kept = read_block_nats(tmp_path / "run" / BLOCK_NATS)
    assert [(when, len(found.sets["validation"].nats)) for when, found in kept.items()] == [("last", 20)]


def test_a_finished_run_that_lost_the_file_writes_it_again(run_folder, tmp_path, capsys):
    arguments, reference = run_folder
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / BLOCK_NATS).unlink()
    assert main([*arguments, f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=auto"]) == 0
    assert "exported again: evaluations/block_nats.safetensors is missing" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", reference)


def test_overwriting_removes_it_and_nothing_else(run_folder, tmp_path, capsys):
    arguments, reference = run_folder
    for name in ("run", "mine"):
        shutil.copytree(reference, tmp_path / name)
    (tmp_path / "mine" / "evaluations" / "notes.txt").write_text("years")
    for name in ("run", "mine"):
        more = [f"--output_dir={tmp_path}/{name}", "--overwrite_output_dir", "--eval_delay=10", "--max_train_steps=10"]
        with largest_file(3000):  # the run ends at its first checkpoint
            assert main([*arguments, *more]) == 1
    assert not (tmp_path / "run" / "evaluations").exists()
    assert [path.name for path in (tmp_path / "mine" / "evaluations").iterdir()] == ["notes.txt"]
    assert "that no run made are kept: evaluations" in capsys.readouterr().err


def test_an_evaluation_alone_leaves_its_nats_too(run_folder, text_file, tmp_path):
    _, folder = run_folder
    arguments = [f"--model_name_or_path={folder}", f"--train_file={text_file}", "--block_size=32", "--num_threads=1"]
    arguments += ["--max_eval_samples=30", "--eval_only", f"--output_dir={tmp_path}/evaluated"]
    assert main(arguments) == 0
    (alone,) = read_block_nats(tmp_path / "evaluated" / BLOCK_NATS).values()
    last = read_block_nats(folder / BLOCK_NATS)["last"]
    assert alone.step is None and alone.sets["validation"].blocks == last.sets["validation"].blocks
    assert alone.sets["validation"].nats == pytest.approx(last.sets["validation"].nats, rel=1e-6)


def test_it_is_on_the_disk_before_it_has_its_name(monkeypatch, tmp_path):
    calls = []
    for name in ("fsync", "replace"):
        does = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *words, does=does, name=name: [calls.append(name), does(*words)])
    write_block_nats(tmp_path, {})
    assert calls == ["fsync", "replace"] and [path.name for path in tmp_path.rglob("*.*")] == [BLOCK_NATS.name]


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"no safetensors at all"])
def test_a_damaged_file_is_one_sentence(content, tmp_path):
    (tmp_path / "block_nats.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"block_nats.safetensors cannot be read: .*--eval_only"):
        read_block_nats(tmp_path / "block_nats.safetensors")
