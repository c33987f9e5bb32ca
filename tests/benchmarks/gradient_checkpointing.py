"""Peak memory and time with and without --gradient_checkpointing, against the length of a block.

python tests/benchmarks/gradient_checkpointing.py --block_sizes 128 512 1024 --steps 4

A GPT-2 of 8 layers, width 256, dropout on, blocks of the help texts that come with Python. Each run is a process of its
own, with and without in turn. A step's time is the median of all but the first; the losses must be the same bit for
bit. Peak memory is that of the process, or on a GPU the most that torch had allocated there.
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


def run(output: Path, block_size: int, batch: int, steps: int, more: list[str]) -> dict:
    """{"gib": peak memory, "seconds": of a step, "losses"}."""
    words = [
        *("--dataset_name=python_docs", "--model_type=gpt2", "--tokenizer_vocab_size=2048", f"--output_dir={output}"),
        f"--config_overrides=n_layer=8,n_head=8,n_embd=256,n_positions={block_size}",
        *(f"--block_size={block_size}", f"--per_device_train_batch_size={batch}", f"--max_train_steps={steps}"),
        *("--max_eval_samples=1", "--logging_steps=1", "--checkpointing_steps=none", *more),
    ]
    command = [sys.executable, "-m", "train_loop.main", *words]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((output / "all_results.json").read_text())
    rates = [line["tokens_per_second"] for line in lines if "loss" in line]
    return {
        "gib": results.get("peak_device_memory_gib", results["peak_memory_gib"]),
        "seconds": statistics.median(batch * (block_size - 1) / rate for rate in rates[1:]),
        "losses": [line["loss"] for line in lines if "loss" in line],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block_sizes", type=int, nargs="+", default=[128, 512, 1024], help="tokens of a block")
    parser.add_argument("--batch_size", type=int, default=8, help="blocks of a micro-batch")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run")
    arguments = parser.parse_args()
    print(
        "| block | without, GiB | with, GiB | without, s a step | with, s a step | ratio |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.block_sizes:
            plain, less = (
                run(Path(folder) / f"{size}{''.join(more)}", size, arguments.batch_size, arguments.steps, more)
                for more in ([], ["--gradient_checkpointing"])
            )
            if plain["losses"] != less["losses"]:
                sys.exit(f"not the same losses: {plain['losses']} and {less['losses']}")
            cells = [plain["gib"], less["gib"], plain["seconds"], less["seconds"], less["seconds"] / plain["seconds"]]
            print(f"| {size} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
