"""Peak memory, speed and the size of a checkpoint of LoRA beside full fine-tuning.

python tests/benchmarks/lora.py --batch_size 8 --steps 6

The model has the shape of distilgpt2 (82 M parameters) and random weights; dropout is on; blocks of 128 random tokens.
Each run is a process of its own. A step's time is the median of all but the first two. Peak memory is that of the
process, or on a GPU the most that torch had allocated there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from throughput import SHAPES, prepare

ROOT = Path(__file__).parents[2]


def run(folder: Path, name: str, batch: int, steps: int, more: list[str]) -> list[str]:
    """The cells of a run's row."""
    output = folder / name.replace(" ", "_")
    words = [
        *(f"--model_name_or_path={folder}", f"--train_file={folder}/data.txt", f"--output_dir={output}"),
        *(f"--per_device_train_batch_size={batch}", f"--max_train_steps={steps}", "--max_eval_samples=1"),
        *("--logging_steps=1", f"--checkpointing_steps={steps}", *more),
    ]
    command = [sys.executable, "-m", "train_loop.main", *words]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((output / "all_results.json").read_text())
    rate = statistics.median([line["tokens_per_second"] for line in lines if "loss" in line][2:])
    gib = results.get("peak_device_memory_gib", results["peak_memory_gib"])
    size = sum(path.stat().st_size for path in (output / "checkpoints").rglob("*.safetensors"))
    return [name, f"{gib:.2f}", f"{rate:,.0f}", f"{size / 1e6:,.1f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8, help="blocks of a micro-batch")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="lora_r")
    arguments = parser.parse_args()
    print("| | peak memory, GiB | tokens/s | checkpoint, MB |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, arguments.batch_size * arguments.steps + 40, 128, SHAPES["distilgpt2"])
        for name, more in {"all weights": [], **{f"lora_r {r}": [f"--lora_r={r}"] for r in arguments.ranks}}.items():
            print(f"| {' | '.join(run(folder, name, arguments.batch_size, arguments.steps, more))} |", flush=True)


if __name__ == "__main__":
    main()
