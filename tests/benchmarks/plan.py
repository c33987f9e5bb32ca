"""What `--dry_run` predicts beside what the run then takes: memory at the peak, seconds a step, seconds in all.

    python tests/benchmarks/plan.py --steps 20                # four models, batches and accumulations; ~10 minutes
    python tests/benchmarks/plan.py --steps 20 --only 0 1

Each row is two processes of their own, one after the other. A step is the median of the run's steps but the first half
of a plan's; the total is the time in the loop: steps, evaluations and a checkpoint at the end.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = [  # shape, block, micro-batch, accumulation, processes
    ("n_layer=4,n_head=4,n_embd=256", 128, 16, 1, 1),
    ("n_layer=4,n_head=4,n_embd=256", 128, 16, 4, 1),
    ("n_layer=4,n_head=4,n_embd=256", 128, 8, 1, 2),
    ("n_layer=6,n_head=8,n_embd=512", 256, 8, 2, 1),
    ("n_layer=6,n_head=12,n_embd=768", 128, 32, 1, 1),
]
GIB_PER_UNIT = {"GiB": 1.0, "MB": 1e6 / 2**30}


def launch(script, num_processes, arguments):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "launch_configs/multi_cpu.yaml"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout


def compare(folder, configuration, num_steps):
    """((GiB, seconds a step, seconds in all) predicted, the same measured, GiB counted)."""
    shape, block, batch, accumulation, num_processes = configuration
    script, output_dir = ROOT / "tests" / "programs" / "timed_loop.py", folder / "run"
    shutil.rmtree(output_dir, ignore_errors=True)
    arguments = [
        "--config=quickstart",
        "--optimizer=adamw",
        f"--config_overrides={shape},n_positions=256",
        f"--block_size={block}",
        f"--per_device_train_batch_size={batch}",
        f"--gradient_accumulation_steps={accumulation}",
        "--per_device_eval_batch_size=8",
        f"--max_train_steps={num_steps}",
        "--logging_steps=1",
        f"--output_dir={output_dir}",
    ]
    said = launch(script, num_processes, [*arguments, "--dry_run"])
    memory, unit = re.search(r"measured +([\d.]+) (GiB|MB)", said).groups()
    counted, counted_unit = re.search(r"counted ([\d.]+) (GiB|MB)", said).groups()
    step = re.search(r"time +([\d.]+) s a step", said)[1]
    total = re.search(r"= ([\d,]+) s, start", said)[1].replace(",", "")
    predicted = float(memory) * GIB_PER_UNIT[unit], float(step), float(total)

    printed = launch(script, num_processes, arguments)
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    full = batch * accumulation * num_processes * (block - 1)
    steps = [full / line["tokens_per_second"] for line in lines if "loss" in line][4:]
    peak = json.loads((output_dir / "all_results.json").read_text())["peak_memory_gib"]
    measured = peak, median(steps), float(re.search(r"LOOP ([\d.]+)", printed)[1])
    return predicted, measured, float(counted) * GIB_PER_UNIT[counted_unit]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", type=int, nargs="*", help="rows to run, from 0")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plan_"))
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    print("| model, block, micro-batch x accumulation x processes | memory, GiB: counted | planned | run | error "
          "| step, s: planned | run | error | total, s: planned | run | error |")  # fmt: skip
    print("|---" * 11 + "|")
    for i, configuration in enumerate(CONFIGURATIONS):
        if options.only is not None and i not in options.only:
            continue
        predicted, measured, counted = compare(folder, configuration, options.steps)
        shape, block, *batch = configuration
        row = [f"{shape}, {block}, {' x '.join(map(str, batch))}", f"{counted:.2f}"]
        for p, m in zip(predicted, measured, strict=True):
            row += [f"{p:.3f}", f"{m:.3f}", f"{p / m - 1:+.1%}"]
        print("| " + " | ".join(row) + " |", flush=True)
    shutil.rmtree(folder)
