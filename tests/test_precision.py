"""Lower precision in the passes, float32 in weights, optimizer and loss."""

import pytest
import torch
from accelerate import Accelerator
from conftest import BLOCK, TINY, largest_difference, lines_of, make_model, train, weights_of
from forks import LAUNCHED, forked

from train_loop.checkpoint import Checkpoints
from train_loop.main import main


def launch(precision, *arguments):
    return forked("train_loop/main.py", *TINY, *arguments, **{**LAUNCHED, "ACCELERATE_MIXED_PRECISION": precision})


def test_bf16_keeps_weights_in_float32_and_stays_near_the_float32_run(text_file, tmp_path, capsys):
    arguments = [f"--train_file={text_file}", "--max_train_steps=13", "--logging_steps=1"]
    done = launch("bf16", *arguments, f"--output_dir={tmp_path}/bf16")
    assert done.returncode == 0, done.stderr
    assert "precision bf16," in done.stdout
    assert main([*TINY, *arguments, f"--output_dir={tmp_path}/float32"]) == 0
    assert "precision float32," in capsys.readouterr().out
    exact, rounded = ([line["loss"] for line in lines_of(tmp_path / p) if "loss" in line] for p in ("float32", "bf16"))
    assert exact != rounded, "autocast was not on"
    assert rounded == pytest.approx(exact, rel=2e-2)  # bf16 has 8 bits
    assert {t.dtype for t in weights_of(tmp_path / "bf16").values()} == {torch.float32}


def test_fp16_on_a_cpu_is_refused(text_file, tmp_path):
    done = launch("fp16", f"--train_file={text_file}", f"--output_dir={tmp_path}/run")
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert "error: mixed precision fp16 needs a GPU: on a CPU use bf16 or no" in done.stderr.splitlines()


class Float16(Accelerator):
    """Float16's scaler without float16's passes, which no CPU has."""

    def __init__(self, scaler):
        super().__init__(cpu=True)
        self.scaler = scaler

    def prepare(self, *objects):
        prepared = super().prepare(*objects)
        self.native_amp = True  # gradients are unscaled before they are clipped only where Accelerate knows of fp16
        self.state._mixed_precision = "fp16"
        return prepared


def test_a_step_that_the_scaler_skips_moves_neither_schedule_nor_step_count(blocks, tmp_path):
    """torch's own GradScaler also works on a CPU. It begins at a scale that overflows float32, and halves it with each
    overflow until gradients fit; the steps after that equal those of a run that had no scaler. Tolerances: float32
    rounding."""
    splits = blocks, blocks[:2]
    options = {"max_grad_norm": 0.5, "max_train_steps": 4, "per_device_train_batch_size": len(blocks)}
    # one batch, so that a skipped one is seen again
    plain, _, weights = train(make_model(), *splits, tmp_path / "plain", **options)
    accelerator = Float16(torch.amp.GradScaler("cpu", init_scale=2.0**127))
    try:
        scaled, _, scaled_weights = train(make_model(), *splits, tmp_path / "scaled", accelerator, **options)
    finally:
        accelerator.state._mixed_precision = "no"  # every Accelerator of this process has the same
    assert accelerator.scaler.get_scale() < 2.0**127, "no step was skipped"
    assert [line["step"] for line in scaled] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in scaled] == [line["learning_rate"] for line in plain]
    assert scaled[-1]["tokens_seen"] == 4 * len(blocks) * (BLOCK - 1)
    for a, b in zip(plain, scaled, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5), "norms are of unscaled gradients"
    assert largest_difference(scaled_weights, weights) < 1e-5


def test_after_a_step_that_the_scaler_skips_nothing_is_saved_or_evaluated_again(blocks, tmp_path, monkeypatch):
    """The scale grows after the second step to one that overflows, so that some windows are skipped then."""
    saved, save = [], Checkpoints.save

    def counted(self, position, *arguments):
        saved.append(position.step)
        save(self, position, *arguments)

    monkeypatch.setattr(Checkpoints, "save", counted)
    accelerator = Float16(torch.amp.GradScaler("cpu", init_scale=1.0, growth_factor=2.0**127, growth_interval=2))
    options = {"max_train_steps": 4, "checkpointing_steps": "2", "eval_steps": 2, "per_device_train_batch_size": 22}
    try:
        lines, _, _ = train(make_model(), blocks, blocks[:2], tmp_path / "run", accelerator, **options)
    finally:
        accelerator.state._mixed_precision = "no"
    assert lines[-1]["epoch"] > 4, "no window was skipped"
    assert saved == [2, 4]
    assert [line["step"] for line in lines_of(tmp_path / "run") if "eval_loss" in line] == [0, 2, 4]
