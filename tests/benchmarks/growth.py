"""Speed and peak memory of this loop against block size, vocabulary and layers, at the same tokens in each step.

python tests/benchmarks/growth.py --plot growth.png                            # about 10 minutes

A GPT-2 of width 256 with random weights and random tokens, dropout on, 4,096 tokens in a step; one of the three grows,
the others stay. Each run is a process of its own. "beyond linear" is the peak memory over what a straight line through
the first two sizes says. With attention's T x T dropped scores, as bytes, memory at equal tokens per step grows with T.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from throughput import ours, prepare

TOKENS = 4096
AXES = {
    "block size": [128, 256, 512, 1024, 2048],
    "vocabulary": [8_000, 32_000, 64_000, 128_000, 256_000],
    "layers": [2, 4, 8, 16, 24],
}


def measure(axis, size, options, folder):
    """(tokens/s, peak memory in GiB)"""
    sizes = {"block size": 128, "vocabulary": 8_000, "layers": 4} | {axis: size}
    options.block_size = sizes["block size"]
    batch = TOKENS // options.block_size
    # the blocks are few, but every word must be in the tokenizer
    prepare(folder, batch * options.steps, options.block_size, (sizes["layers"], 256, 8), sizes["vocabulary"])
    done = ours(folder, batch, options.steps, False, options)
    return batch * (options.block_size - 1) / statistics.median(done["seconds"]), done["peak"]


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(9, 4.4), layout="constrained")
    for column, (axis, rows) in zip(axes.T, results.items(), strict=True):
        for place, (index, label) in zip(column, ((1, "tokens per second"), (2, "peak memory (GiB)")), strict=True):
            place.plot([row[0] for row in rows], [row[index] for row in rows], marker="o")
            place.set_xlabel(axis)
            place.set_ylabel(label)
            place.set_ylim(bottom=0)
            place.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", choices=AXES, nargs="+", default=list(AXES), help="what grows")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a run")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--plot", type=Path, help="file for a picture (PNG)")
    options = parser.parse_args()
    options.compiled, results = False, {}
    print("| what grows | size | tokens/s | peak GiB | beyond linear |\n|---|---|---|---|---|")
    for axis in options.axes:
        rows = results[axis] = []
        for size in AXES[axis]:
            with tempfile.TemporaryDirectory() as folder:
                rows.append((size, *measure(axis, size, options, Path(folder))))
            (first, _, base), (second, _, then) = rows[0], rows[min(1, len(rows) - 1)]
            line = base + (then - base) / max(1, second - first) * (size - first)
            print(
                f"| {axis} | {size:,} | {rows[-1][1]:,.0f} | {rows[-1][2]:.2f} | {rows[-1][2] / line:.2f} |", flush=True
            )
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
