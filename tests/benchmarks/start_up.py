"""Seconds from the start of the process to the end of the first optimizer step, beside a script with `Trainer`.

python tests/benchmarks/start_up.py --repetitions 5 --json start_up.json

A tiny GPT-2 in a folder, 300 kB of text; both have prepared it before, and find it in their caches. Each run is a
process of its own, the two in turn. Ours evaluates two blocks before the first step, Trainer nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def prepare(folder):
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2TokenizerFast

    (folder / "data.txt").write_text("".join(topics[name] for name in sorted(topics))[:300_000], encoding="utf-8")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(folder / "data.txt")], vocab_size=1000, show_progress=False)
    tokenizer.save_model(str(folder))
    GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")).save_pretrained(folder)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 1001, "bos_token_id": 0, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).save_pretrained(folder)


def seconds_to_first_step(command, folder):
    """From the start of `command` to its first line with a step."""
    began = time.time()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    seconds = None
    for line in process.stdout:
        words = line.split()
        if line.startswith("FIRST STEP") or (words[:1] == ["1"] and seconds is None):  # of the table: step 1
            seconds = time.time() - began
    if process.wait() or seconds is None:
        sys.exit(f"{command[1:3]} failed:\n{process.stderr.read()[-2000:]}")
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    runs = {"train_loop": [], "Trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder)
        trainer = ROOT / "tests" / "programs" / "trainers_first_step.py"
        ours = [sys.executable, "-m", "train_loop.main", "--model_name_or_path", folder, "--overwrite_output_dir"]
        ours += ["--train_file", folder / "data.txt", "--max_train_steps", 1, "--logging_steps", 1]
        ours += ["--max_eval_samples", 2, "--checkpointing_steps", "none", "--output_dir", folder / "ours"]
        commands = {"train_loop": ours, "Trainer": [sys.executable, trainer, folder]}
        for repetition in range(-1, arguments.repetitions):  # the first fills the caches
            for name, command in commands.items():
                seconds = seconds_to_first_step(command, folder)
                if repetition >= 0:
                    runs[name].append(seconds)
    ratios = [a / b for a, b in zip(*runs.values(), strict=True)]
    rows = {f"{name}, s": values for name, values in runs.items()} | {"ratio": ratios}
    print(f"{'':>14} {'min':>8} {'median':>8} {'max':>8}")
    for name, values in rows.items():
        print(f"{name:>14} {min(values):>8.2f} {statistics.median(values):>8.2f} {max(values):>8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
