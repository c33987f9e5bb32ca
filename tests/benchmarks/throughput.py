"""Tokens per second and peak memory of this loop and of `transformers.Trainer`, in turn, on the same work.

python tests/benchmarks/throughput.py --batch_sizes 8 32 --repetitions 3 --json speed.json --plot speed.png
python tests/benchmarks/throughput.py --model gpt2-medium --block_size 1024 --precision bf16 --steps 60
git worktree add ../before HEAD~1; python tests/benchmarks/throughput.py --against ../before   # what a change costs

The model has the shape of a published one (distilgpt2: 82 M parameters) and random weights; dropout is on; the data is
the same random tokens in blocks, in the same order of batches' size. Each run is a process of its own, ours and
Trainer's in turn. The time of an optimizer step is the median of a run's steps but the first two. Dropout draws other
numbers in each, so losses agree to about a part in a hundred; the script stops where they do not.

Memory is the largest resident set of the process, and on a GPU the most that torch had allocated there. The share is
the rate of the model's floating-point operations over the best rate of the machine: what a float32 product of matrices
reaches on the CPU, or what `--peak_tflops` says (989 for an H100 in bf16), which makes it model FLOPs utilisation.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VOCAB = 50257
SHAPES = {  # layers, width, heads
    "distilgpt2": (6, 768, 12),
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
}


def prepare(folder, num_blocks, block_size, shape, vocab=VOCAB):
    """A folder with the model and a word-level tokenizer of as many tokens, and files of the same random tokens."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    layers, width, heads = shape
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocab}
    config = AutoConfig.for_model("gpt2", **sizes, n_positions=max(1024, block_size))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{vocab - 1}").save_pretrained(folder)
    blocks = np.random.default_rng(0).integers(vocab, size=(num_blocks, block_size))
    text = "\n".join(" ".join(f"w{token}" for token in block) for block in blocks)
    (folder / "data.txt").write_text(text + "\n", encoding="utf-8")
    np.save(folder / "blocks.npy", blocks)


def run(command, environment=(), checkout=ROOT):
    """(what the process printed, its peak memory in GiB)."""
    # the interpreter starts the command by itself, so that the peak is of that process alone
    wrapped = (
        "import resource, subprocess, sys; s = subprocess.run(sys.argv[1:]).returncode; "
        "print('PEAK', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20); sys.exit(s)"
    )
    done = subprocess.run(
        [sys.executable, "-c", wrapped, *map(str, command)],
        cwd=checkout,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout), **dict(environment)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:3]))} failed:\n{done.stderr[-3000:]}")
    *printed, peak = done.stdout.strip().splitlines()
    return printed, float(peak.split()[1])


def ours(folder, batch, num_steps, evaluate, options, checkout=ROOT, start=("-m", "train_loop.main")):
    """{"loss", "seconds": of each step, "peak"} of this loop."""
    output, block_size = folder / "ours", options.block_size
    arguments = [
        *("--model_name_or_path", folder, "--validation_file", folder / "data.txt", "--output_dir", output),
        *("--overwrite_output_dir", "--block_size", block_size, "--per_device_eval_batch_size", batch),
    ]
    if evaluate:
        arguments.append("--eval_only")
    else:
        arguments += ["--train_file", folder / "data.txt", "--max_eval_samples", 1, "--max_train_steps", num_steps]
        arguments += ["--per_device_train_batch_size", batch, "--learning_rate", 2e-5, "--weight_decay", 0.01]
        arguments += ["--logging_steps", 1, "--checkpointing_steps", "none"]
    environment = {"HF_HOME": str(folder / "cache")}
    if options.compiled:
        environment["ACCELERATE_DYNAMO_BACKEND"] = "inductor"
    if options.precision == "bf16":
        environment["ACCELERATE_MIXED_PRECISION"] = "bf16"
    elif options.precision == "tf32":
        arguments.append("--tf32")
    _, peak = run([sys.executable, *start, *arguments], environment, checkout)
    results = json.loads((output / "all_results.json").read_text())
    peak = results.get("peak_device_memory_gib", peak)
    if evaluate:
        return {"loss": results["eval_loss"], "seconds": [results["eval_runtime"]], "peak": peak}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    # as Trainer's clock does, without the first two steps
    seconds = [batch * (block_size - 1) / line["tokens_per_second"] for line in lines[2:]]
    return {"loss": lines[-1]["loss"], "seconds": seconds, "peak": peak}


def trainers(folder, batch, num_steps, evaluate, options):
    """The same of `transformers.Trainer`."""
    script = ROOT / "tests" / "programs" / "trainers_steps.py"
    command = [sys.executable, script, folder, folder / "blocks.npy", options.precision, batch, num_steps]
    printed, peak = run([*command, int(evaluate)])
    done = json.loads(printed[-1])
    return done | {"peak": done.pop("device_peak", peak)}


def sgemm_flops(size=2048, tries=20):
    """Floating-point operations per second of the best of some products of two float32 matrices, on all cores."""
    import time

    import torch

    a = torch.randn(size, size)
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def model_flops(batch, block_size, shape):
    """Of one training step: six for each weight that a token is multiplied with, and attention's two products."""
    layers, width, _ = shape
    tokens = batch * block_size
    weights = layers * 12 * width**2 * tokens + VOCAB * width * batch * (block_size - 1)
    return 6 * weights + layers * 12 * tokens * block_size * width


def spread(values):
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def plot(results, path, block_size):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    rows = [row for row in results if not row["evaluation"]]
    for name, color in zip(
        [n for n in rows[0] if isinstance(rows[0][n], dict)][:2], ("tab:blue", "tab:orange"), strict=True
    ):
        x = [row["batch"] for row in rows]
        for axis, key in zip(axes, ("tokens_per_second", "peak_gib"), strict=True):
            values = [row[name][key] for row in rows]
            axis.plot(x, [v["median"] for v in values], marker="o", color=color, label=name)
            axis.fill_between(x, [v["min"] for v in values], [v["max"] for v in values], color=color, alpha=0.2)
    for axis, label in zip(axes, ("training speed (tokens per second)", "peak memory (GiB)"), strict=True):
        axis.set_xlabel(f"batch size (blocks of {block_size} tokens)")
        axis.set_ylabel(label)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["batch"] for row in rows], [str(row["batch"]) for row in rows])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32], help="blocks in an optimizer step")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--evaluation", action="store_true", help="evaluation instead, over the blocks of all steps")
    parser.add_argument("--model", choices=SHAPES, default="distilgpt2", help="whose shape the model has")
    parser.add_argument("--block_size", type=int, default=128, help="tokens of a block")
    parser.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="float32", help="of both")
    parser.add_argument("--peak_tflops", type=float, help="of the device at this precision, for its utilisation")
    parser.add_argument("--compiled", action="store_true", help="this loop with torch.compile (inductor)")
    parser.add_argument("--against", type=Path, help="a different checkout of this repository in Trainer's place")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="file for a picture (PNG)")
    arguments = parser.parse_args()
    shape, block_size = SHAPES[arguments.model], arguments.block_size
    other, others = "Trainer", trainers
    if arguments.against:
        other, others = "other", functools.partial(ours, checkout=arguments.against.resolve())
    results = []
    print(f"{'batch':>6} {'what':>10} {'':>10} {'tokens/s':>23} {'GiB':>17} {'loss':>8}   min / median / max")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, max(arguments.batch_sizes) * arguments.steps, block_size, shape)
        for evaluate in [arguments.evaluation]:
            for batch in arguments.batch_sizes:
                row = {"batch": batch, "evaluation": evaluate}
                runs = {"train_loop": [], other: []}
                for _ in range(arguments.repetitions):
                    for name, function in (("train_loop", ours), (other, others)):
                        runs[name].append(function(folder, batch, arguments.steps, evaluate, arguments))
                for name, done in runs.items():
                    num_blocks = max(arguments.batch_sizes) * arguments.steps if evaluate else batch
                    seconds = [statistics.median(run["seconds"]) for run in done]
                    row[name] = {
                        "tokens_per_second": spread([num_blocks * (block_size - 1) / s for s in seconds]),
                        "peak_gib": spread([run["peak"] for run in done]),
                        "loss": done[0]["loss"],
                    }
                    t, m = row[name]["tokens_per_second"], row[name]["peak_gib"]
                    print(
                        f"{batch:>6} {'evaluation' if evaluate else 'training':>10} {name:>10} "
                        f"{t['min']:>7,.1f}{t['median']:>8,.1f}{t['max']:>8,.1f} "
                        f"{m['min']:>5.2f} {m['median']:>5.2f} {m['max']:>5.2f} {row[name]['loss']:>8.4f}",
                        flush=True,
                    )
                pairs = list(zip(*runs.values(), strict=True))
                speed = [statistics.median(b["seconds"]) / statistics.median(a["seconds"]) for a, b in pairs]
                memory = [a["peak"] / b["peak"] for a, b in pairs]
                row["speed_ratio"], row["memory_ratio"] = spread(speed), spread(memory)
                line = f"{'':>17} {'ratio':>10} {'':>7}{row['speed_ratio']['median']:>8.2f}{'':>9}"
                line += f"      {row['memory_ratio']['median']:>5.2f}"
                if not evaluate:
                    own_rate = arguments.peak_tflops * 1e12 if arguments.peak_tflops else sgemm_flops()
                    median = statistics.median(statistics.median(run["seconds"]) for run in runs["train_loop"])
                    row["best_gflops"] = own_rate / 1e9
                    row["share"] = model_flops(batch, block_size, shape) / median / own_rate
                    line += f"   share of {own_rate / 1e9:.0f} GFLOP/s: {row['share']:.2f}"
                print(line, flush=True)
                losses = [row[name]["loss"] for name in runs]
                if abs(losses[0] / losses[1] - 1) > (1e-4 if evaluate else 0.02):
                    sys.exit(f"not the same work: losses {losses}")
                results.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plot:
        plot(results, arguments.plot, block_size)


if __name__ == "__main__":
    main()
