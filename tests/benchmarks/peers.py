"""Speed and peak memory of this loop beside other people's: TRL's SFTTrainer, nanoGPT, and other losses in our loop.

python -m pip install trl cut-cross-entropy liger-kernel && git clone https://github.com/karpathy/nanoGPT
python tests/benchmarks/peers.py --nanogpt nanoGPT --runs runs.jsonl             # about 7 minutes on two cores
python tests/benchmarks/peers.py --nanogpt nanoGPT --runs runs.jsonl --batch_size 32 --precision bf16

The model has the shape of distilgpt2 and random weights; dropout is on; the data is the same random tokens in blocks of
128. Each run is a process of its own, all in turn. Each peer is as its authors ship it: SFTTrainer with its default
loss, once with gradient checkpointing, its default, and once without; nanoGPT's train.py unmodified, with our shape
given by its options, once compiled, its default, and once not. It has no bf16 on a CPU and is left out there. Its
weights are its own and it draws blocks at random places, so its loss is near ours, not equal. `cut-cross-entropy`,
`liger-kernel` and torch's own `linear_cross_entropy` stand in for this loop's head and loss; all else is this loop.

A step's time is the median of a run's steps but the first two, or but the first four where something is compiled.
Tokens are targets: 127 of a block, 128 in nanoGPT. Memory is the largest resident set of the process. `--runs` keeps
each run as a line, and the table is of all runs in it of this batch, precision and shape.
"""

import argparse
import functools
import importlib.util
import json
import pickle
import re
import statistics
import sys
import tempfile
from pathlib import Path

from throughput import ROOT, SHAPES, VOCAB, ours, prepare, run

PROGRAMS = ROOT / "tests" / "programs"


def sft_trainer(folder, options, checkpointing):
    command = [sys.executable, PROGRAMS / "peers_trl.py", folder, options.precision, options.batch_size, options.steps]
    printed, peak = run([*command, int(checkpointing)], {"HF_HOME": str(folder / "cache")})
    return json.loads(printed[-1]) | {"peak": peak}


def this_loop(folder, options, head=None):
    start = (PROGRAMS / "peers_head.py", head) if head else ("-m", "train_loop.main")
    return ours(folder, options.batch_size, options.steps, False, options, start=start)


def nano_gpt(folder, options, compiled):
    import numpy as np

    if options.precision != "float32":
        raise ValueError("has no bf16 on a CPU")
    if options.nanogpt is None:
        raise ValueError("needs --nanogpt, a checkout of it")
    data = folder / "nanogpt"
    data.mkdir(exist_ok=True)
    blocks = np.load(folder / "blocks.npy").astype(np.uint16)
    for name in ("train.bin", "val.bin"):
        blocks.tofile(data / name)
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": VOCAB}))
    layers, width, heads = SHAPES[options.model]
    given = {
        **{"dataset": data, "out_dir": data / "out", "device": "cpu", "dtype": "float32", "compile": compiled},
        **{"n_layer": layers, "n_embd": width, "n_head": heads, "dropout": 0.1, "bias": True, "block_size": 128},
        **{"batch_size": options.batch_size, "gradient_accumulation_steps": 1, "max_iters": options.steps - 1},
        **{"learning_rate": 2e-5, "weight_decay": 0.01, "beta2": 0.999, "decay_lr": False},
        **{"eval_iters": 1, "eval_interval": 10**6, "always_save_checkpoint": False},  # it evaluates before step 0
    }
    words = [f"--{name}={value}" for name, value in given.items()]
    printed, peak = run([sys.executable, "train.py", *words], checkout=options.nanogpt.resolve())
    steps = [line.replace(",", "").split() for line in printed if line.startswith("iter ")]
    seconds = [float(step[5].removesuffix("ms")) / 1000 for step in steps]
    return {"loss": float(steps[-1][3]), "seconds": seconds[2:], "peak": peak}


# name: (its run, the module that it needs, whether something is compiled)
PEERS = {
    "this loop": (this_loop, "train_loop", False),
    "SFTTrainer": (functools.partial(sft_trainer, checkpointing=True), "trl", False),
    "SFTTrainer, no checkpointing": (functools.partial(sft_trainer, checkpointing=False), "trl", False),
    "cut-cross-entropy": (functools.partial(this_loop, head="cut-cross-entropy"), "cut_cross_entropy", True),
    "liger-kernel": (functools.partial(this_loop, head="liger-kernel"), "liger_kernel", False),
    "torch linear_cross_entropy": (functools.partial(this_loop, head="torch"), "torch", False),
    "nanoGPT": (functools.partial(nano_gpt, compiled=False), "torch", False),
    "nanoGPT, compiled": (functools.partial(nano_gpt, compiled=True), "torch", True),
}


def measure(name, folder, options):
    """The run's line for `--runs`; None, with the reason printed, where the peer is missing or fails."""
    function, module, compiled = PEERS[name]
    try:
        if not importlib.util.find_spec(module):
            raise ValueError(f"{module} is not installed")
        done = function(folder, options)
    except (ValueError, SystemExit) as error:  # `run` ends with what the process printed
        reasons = [line for line in str(error).splitlines() if re.match(r"\w*Error: ", line)]
        print(f"left out: {name}: {reasons[-1] if reasons else error}", flush=True)
        return None
    seconds = statistics.median(done["seconds"][2 if compiled else 0 :])
    targets = 128 if name.startswith("nanoGPT") else 127
    speed = options.batch_size * targets / seconds
    print(f"{name}: {speed:,.0f} tokens/s, {done['peak']:.2f} GiB, loss {done['loss']:.4f}", flush=True)
    return {"peer": name, "tokens_per_second": speed, "gib": done["peak"], "loss": done["loss"]}


def table(rounds):
    """Rows of markdown. Ratios are the median of the rounds' own: our tokens/s over theirs, our memory over theirs."""
    yield "| | tokens/s | GiB | our speed / its | our memory / its |\n|---|---|---|---|---|"
    for name in PEERS:
        pairs = [(a["this loop"], a[name]) for a in rounds if name in a]
        if not pairs:
            continue
        speed = sorted(peer["tokens_per_second"] for _, peer in pairs)
        gib = statistics.median(peer["gib"] for _, peer in pairs)
        faster = statistics.median(us["tokens_per_second"] / peer["tokens_per_second"] for us, peer in pairs)
        smaller = statistics.median(us["gib"] / peer["gib"] for us, peer in pairs)
        middle = f"{statistics.median(speed):,.0f} ({speed[0]:,.0f} to {speed[-1]:,.0f})"
        yield f"| {name} | {middle} | {gib:.2f} | {faster:.2f} | {smaller:.2f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--batch_size", type=int, default=8, help="blocks in a step")
    parser.add_argument("--steps", type=int, default=7, help="optimizer steps of a run, 5 at least where compiled")
    parser.add_argument("--repetitions", type=int, default=1, help="runs of each, in turn")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--model", choices=SHAPES, default="distilgpt2", help="whose shape the model has")
    parser.add_argument("--only", choices=PEERS, nargs="+", default=list(PEERS))
    parser.add_argument("--runs", type=Path, help="file that gets a line for each round of runs")
    options = parser.parse_args()
    if options.steps < 5 and any(PEERS[name][2] for name in options.only):
        parser.error("--steps must be 5 at least where something is compiled: leave that out with --only")
    options.block_size, options.compiled = 128, False
    work = {"batch": options.batch_size, "precision": options.precision, "model": options.model}
    earlier = options.runs.read_text().splitlines() if options.runs and options.runs.exists() else []
    rounds = [found["runs"] for found in map(json.loads, earlier) if found["work"] == work]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.batch_size * options.steps, 128, SHAPES[options.model])
        for _ in range(options.repetitions):
            done = [measure(name, Path(folder), options) for name in PEERS if name in {"this loop", *options.only}]
            runs = {found.pop("peer"): found for found in done if found}
            if "this loop" not in runs:
                sys.exit("this loop failed: the round is not kept")
            for name, found in runs.items():
                if abs(found["loss"] / runs["this loop"]["loss"] - 1) > 0.02:
                    sys.exit(f"not the same work: the losses of {name} and this loop, in {runs}")
            rounds.append(runs)
            if options.runs:
                with options.runs.open("a") as file:
                    file.write(json.dumps({"work": work, "runs": runs}) + "\n")
    print("\n".join(table(rounds)))


if __name__ == "__main__":
    main()
