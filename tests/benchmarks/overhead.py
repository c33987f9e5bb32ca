"""What the loop costs beside forward, backward, clipping and the optimizer's step, with a tiny model.

python tests/benchmarks/overhead.py --repetitions 7 --json overhead.json

The same steps of the same model, in this loop with a line logged every step, and in a bare one over batches that lie
ready; in turn, in one process. Both end with the same weights. And: the same micro-batches, eight to an optimizer
step. Times are of the whole run, divided by its micro-batches.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from train_loop import loop, tuning  # noqa: E402
from train_loop.checkpoint.checkpoint import Checkpoints  # noqa: E402
from train_loop.data.blocks import Split, Windows, block_order  # noqa: E402
from train_loop.loss import next_token_loss  # noqa: E402
from train_loop.optim import build_optimizer, build_scheduler  # noqa: E402
from train_loop.position import Position  # noqa: E402
from train_loop.report.metrics import Metrics  # noqa: E402
from train_loop.services import Services  # noqa: E402
from train_loop.settings.settings import Settings  # noqa: E402

VOCAB, BLOCK, BATCH = 512, 128, 8


class NoSignal:
    number = 0

    def agreed(self, accelerator, clock=None):
        return False


def make():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.train()


def our_run(blocks, num_steps, accumulation=1):
    """(seconds, weights, last loss) of the loop, with a line logged every step and one evaluation of a block."""
    model = make()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulation,
            max_train_steps=num_steps // accumulation,
            logging_steps=1,
            eval_steps=10**9,
            checkpointing_steps="none",
        )
        accelerator = Accelerator(cpu=True)
        optimizer = build_optimizer(model, settings)
        model, optimizer = accelerator.prepare(model, optimizer)
        metrics = Metrics(folder, num_steps, is_main=True)
        position = Position(evaluated_step=0)
        began = time.perf_counter()
        loop.train(
            model=model,
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, settings, num_steps),
            position=position,
            train_split=Split("training", blocks),
            eval_splits={"validation": Split("validation", blocks[:1])},
            settings=settings,
            services=Services(accelerator, metrics, Checkpoints(settings, accelerator), NoSignal()),
        )
        return time.perf_counter() - began, model.state_dict(), metrics.train_loss


def bare_run(blocks, num_steps):
    """The same of a bare loop."""
    model = make()
    settings = Settings()
    optimizer = build_optimizer(model, settings)
    scheduler = build_scheduler(optimizer, settings, num_steps)
    windows = Windows(blocks, block_order(blocks, settings.seed, 0), BATCH, 1)
    batches = [{name: value[0] for name, value in windows[i].items()} for i in range(num_steps)]
    began = time.perf_counter()
    for batch in batches:
        nll_sum, num_targets, _ = next_token_loss(model, batch)
        (nll_sum / num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return time.perf_counter() - began, model.state_dict(), (nll_sum / num_targets).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=96, help="micro-batches of a run")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(tuning.num_cores())
    num_steps = arguments.steps
    blocks = np.random.default_rng(0).integers(VOCAB, size=(BATCH * num_steps, BLOCK), dtype=np.int32)
    sys.stdout, shown = io.StringIO(), sys.stdout  # the table of the loop
    runs = {"loop": [], "bare": [], "accumulated x 8": []}
    our_run(blocks, 5)
    for _ in range(arguments.repetitions):
        ours, bare, accumulated = our_run(blocks, num_steps), bare_run(blocks, num_steps), our_run(blocks, num_steps, 8)
        difference = max((ours[1][name] - bare[1][name]).abs().max().item() for name in ours[1])
        if difference > 1e-6:
            sys.exit(f"not the same work: weights differ by {difference}")
        for name, run in zip(runs, (ours, bare, accumulated), strict=True):
            runs[name].append(run[0] / num_steps * 1e3)
    sys.stdout = shown
    overhead = [100 * (a / b - 1) for a, b in zip(runs["loop"], runs["bare"], strict=True)]
    accumulation = [100 * (a / b - 1) for a, b in zip(runs["accumulated x 8"], runs["loop"], strict=True)]
    print(f"{'':>34} {'min':>8} {'median':>8} {'max':>8}")
    rows = {f"{name}, ms a micro-batch": values for name, values in runs.items()} | {
        "overhead, %": overhead,
        "accumulation's, %": accumulation,
    }
    for name, values in rows.items():
        print(f"{name:>34} {min(values):>8.2f} {statistics.median(values):>8.2f} {max(values):>8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
