"""Tokens per second of a run beside other processes that want the same cores, by how its threads wait for each other.

python tests/benchmarks/competitors.py --repetitions 3                         # about 12 minutes
python tests/benchmarks/competitors.py --models small --beside runs --repetitions 1

The ways, in turn: "default" is what GNU OpenMP does by itself (threads spin for milliseconds), "passive" threads that
never spin, "shared" what this loop does (`tuning.sharing_cores`: threads spin while no other process wants the cores).
Beside it runs nothing, a busy loop for each core, or two other runs of this loop in the same way. The figure of a run
is the median of its logged lines but the first third.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
WAYS = {"default": {"GOMP_SPINCOUNT": "300000"}, "passive": {"OMP_WAIT_POLICY": "passive"}, "shared": {}}
QUICKSTART = "--model_type=gpt2 --config_overrides=n_layer=4,n_head=4,n_embd=256,n_positions=256 --block_size=128"
SMALL = (
    "--model_type=llama --config_overrides=hidden_size=64,intermediate_size=172,num_hidden_layers=5,"
    "num_attention_heads=8,num_key_value_heads=4,max_position_embeddings=512 --block_size=64"
)
DISTILGPT2 = "--model_type=gpt2 --config_overrides=n_layer=6,vocab_size=50257 --block_size=128"
MODELS = {  # arguments, steps alone, steps beside others, steps in a logged line
    "small": (f"{SMALL} --tokenizer_vocab_size=512 --per_device_train_batch_size=8", 240, 120, 15),  # as stories260K
    "quickstart": (f"{QUICKSTART} --tokenizer_vocab_size=2048 --per_device_train_batch_size=16", 60, 24, 3),
    "distilgpt2": (f"{DISTILGPT2} --tokenizer_vocab_size=2048 --per_device_train_batch_size=8", 9, 6, 1),
}


def command(model, num_steps, folder):
    arguments, *_, logging_steps = MODELS[model]
    more = "--dataset_name=python_docs --max_eval_samples=1 --checkpointing_steps=none --overwrite_output_dir"
    more += f" --max_train_steps={num_steps} --logging_steps={logging_steps} --output_dir={folder}"
    return [sys.executable, "-m", "train_loop.main", *arguments.split(), *more.split()]


def tokens_per_second(model, way, beside, folder):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **WAYS[way]}
    num_cores = len(os.sched_getaffinity(0))
    others = []
    if beside == "busy loops":
        others = [[sys.executable, "-c", "while True: pass"]] * num_cores
    elif beside == "runs":
        others = [command(model, 10**6, folder / f"other{i}") for i in range(2)]
    quiet = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL}
    running = [subprocess.Popen(other, **quiet) for other in others]
    try:
        num_steps = MODELS[model][2 if others else 1]
        subprocess.run(command(model, num_steps, folder / "run"), check=True, **quiet)
        if any(other.poll() is not None for other in running):
            sys.exit("a competitor has ended")
    finally:
        for other in running:
            other.kill()
            other.wait()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "loss" in line]
    return statistics.median(rates[len(rates) // 3 :])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS), help="shapes of the model")
    parser.add_argument("--beside", choices=["nothing", "busy loops", "runs"], nargs="+", help="default: all three")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), help="how threads wait")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each, in turn")
    arguments = parser.parse_args()
    print("| model | beside | " + " | ".join(arguments.ways) + " | shared / default |\n" + "|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            for beside in arguments.beside or ["nothing", "busy loops", "runs"]:
                rates = {way: [] for way in arguments.ways}
                for _ in range(arguments.repetitions):
                    for way, found in rates.items():
                        found.append(tokens_per_second(model, way, beside, Path(folder)))
                cells = [f"{statistics.median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})" for r in rates.values()]
                pairs = zip(rates.get("shared", []), rates.get("default", []), strict=False)
                ratios = [ours / theirs for ours, theirs in pairs]
                cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
                print(f"| {model} | {beside} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
