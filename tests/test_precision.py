"""Lower precision in the passes, float32 in weights, optimizer and loss."""

import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import BLOCK, TINY, lines_of, run
from safetensors.torch import load_file
from test_loop import StopSignalThatNeverComes, make_model

from train_loop import loop
from train_loop.checkpoint import Checkpoints
from train_loop.config import Settings
from train_loop.data import Split
from train_loop.metrics import Metrics
from train_loop.optim import build_optimizer, build_scheduler
from train_loop.position import Position


def launch(precision, *arguments):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", precision)
    return run("train_loop/main.py", *TINY, *arguments, launcher=launcher)


def test_bf16_keeps_weights_in_float32_and_stays_near_the_float32_run(text_file, tmp_path):
    arguments = [f"--train_file={text_file}", "--max_train_steps=13", "--logging_steps=1"]
    for precision in ("no", "bf16"):
        done = launch(precision, *arguments, f"--output_dir={tmp_path}/{precision}")
        assert done.returncode == 0, done.stderr
        assert f"precision {'float32' if precision == 'no' else precision}," in done.stdout
    exact, rounded = ([line["loss"] for line in lines_of(tmp_path / p) if "loss" in line] for p in ("no", "bf16"))
    assert exact != rounded, "autocast was not on"
    assert rounded == pytest.approx(exact, rel=2e-2)  # bf16 has 8 bits
    assert {t.dtype for t in load_file(tmp_path / "bf16" / "model.safetensors").values()} == {torch.float32}


def test_fp16_on_a_cpu_is_refused(text_file, tmp_path):
    done = launch("fp16", f"--train_file={text_file}", f"--output_dir={tmp_path}/run")
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert "error: mixed precision fp16 needs a GPU: on a CPU use bf16 or no" in done.stderr.splitlines()


def test_a_step_that_the_scaler_skips_moves_neither_schedule_nor_step_count(blocks, tmp_path):
    """torch's own GradScaler works on a CPU too. It begins at a scale that overflows float32, and halves it with each
    overflow until gradients fit; the steps after that equal those of a run that had no scaler."""

    def train(output_dir, scaler):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scaler
        settings = Settings(
            output_dir=str(output_dir),
            checkpointing_steps="none",
            max_grad_norm=0.5,
            logging_steps=1,
            max_train_steps=4,
            learning_rate=1e-3,
        )
        settings.per_device_train_batch_size = len(blocks)  # one batch, so that a skipped one is seen again
        model = make_model()
        optimizer = build_optimizer(model, settings)
        scheduler = build_scheduler(optimizer, settings, 4)
        prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
        if scaler is not None:  # gradients are unscaled before they are clipped only where Accelerate knows of fp16
            accelerator.native_amp = True
            accelerator.state._mixed_precision = "fp16"
        output_dir.mkdir()
        metrics = Metrics(output_dir, 4, is_main=True)
        try:
            splits = Split("training", blocks), Split("validation", blocks[:2])
            loop.train(
                prepared,
                prepared_optimizer,
                scheduler,
                Position(),
                *splits,
                settings,
                accelerator,
                metrics,
                Checkpoints(settings, accelerator),
                StopSignalThatNeverComes(),
            )
        finally:
            accelerator.state._mixed_precision = "no"
        return [line for line in lines_of(output_dir) if "loss" in line], metrics, model.state_dict()

    plain, _, weights = train(tmp_path / "plain", None)
    scaled, metrics, scaled_weights = train(tmp_path / "scaled", torch.amp.GradScaler("cpu", init_scale=2.0**127))
    assert metrics.num_skipped_steps > 0
    assert [line["step"] for line in scaled] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in scaled] == [line["learning_rate"] for line in plain]
    assert scaled[-1]["tokens_seen"] == 4 * len(blocks) * (BLOCK - 1)
    for a, b in zip(plain, scaled, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5), "norms are of unscaled gradients"
    assert max((weights[name] - scaled_weights[name]).abs().max().item() for name in weights) < 1e-5
