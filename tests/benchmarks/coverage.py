"""How often the 95 % interval of `python -m train_loop.compare` covers the truth: in simulations, and on real runs.

python tests/benchmarks/coverage.py                                        # simulated blocks: a minute
python tests/benchmarks/coverage.py --seeds 20 --output_dir runs/seeds     # and twenty runs

The runs are one recipe with many seeds: 200 steps of a small GPT-2 on the texts that Python carries, about 15 s each on
one core. They are split at random into two "recipes"; the truth is that there is no difference. Runs that are finished
are used again. Further arguments go to the runs.
"""

import argparse
from pathlib import Path

import numpy as np

from train_loop.compare import difference
from train_loop.main import main
from train_loop.report import BLOCK_NATS, read_block_nats

RECIPE = [
    "--model_type=gpt2",
    "--config_overrides=n_layer=2,n_head=2,n_embd=64,n_positions=64",
    "--tokenizer_vocab_size=1000",
    "--dataset_name=python_docs",
    "--block_size=64",
    "--per_device_train_batch_size=16",
    "--per_device_eval_batch_size=16",
    "--learning_rate=3e-3",
    "--validation_split_percentage=20",
    "--max_train_steps=200",
    "--num_warmup_steps=20",
    "--eval_delay=200",
    "--eval_steps=200",
    "--checkpointing_steps=none",
    "--overwrite_output_dir",
    "--num_threads=1",
]


NAIVE = "blocks as if independent"


def neighbours_alike(generator: np.random.Generator, shape: tuple[int, int], correlation: float) -> np.ndarray:
    """Autoregressive noise of variance 1."""
    noise = generator.standard_normal(shape)
    for i in range(1, shape[1]):
        noise[:, i] = correlation * noise[:, i - 1] + (1 - correlation**2) ** 0.5 * noise[:, i]
    return noise


def documents(generator: np.random.Generator, shape: tuple[int, int], length: int) -> np.ndarray:
    """Noise of variance 1, of which 0.15 is the same in all blocks of a document, of about `length` blocks."""
    noise = 0.85**0.5 * generator.standard_normal(shape)
    for row in noise:
        lengths = np.maximum(1, generator.poisson(length, shape[1] + length))
        of_document = np.repeat(generator.standard_normal(len(lengths)), lengths)
        row += 0.15**0.5 * of_document[generator.integers(length) :][: shape[1]]
    return noise


def simulate(times: int) -> None:
    generator = np.random.default_rng(5)
    for num_blocks in (96, 240, 1931):
        shape, targets = (times, num_blocks), np.full(num_blocks, 127.0)
        kinds = {f"autocorrelation {c}": neighbours_alike(generator, shape, c) for c in (0.0, 0.3, 0.6)}
        kinds |= {f"documents of {length} blocks": documents(generator, shape, length) for length in (4, 28)}
        for name, noise in kinds.items():
            found = [difference(np.zeros((1, num_blocks)), 127 * row[None], targets) for row in noise]
            covers = np.mean([abs(one.value) <= one.half_width for one in found])
            naive = np.mean(np.abs(noise.mean(1)) <= 1.96 * noise.std(1, ddof=1) / num_blocks**0.5)
            print(f"{num_blocks:,} blocks, {name}: zero is covered: {covers:.1%}, {NAIVE} {naive:.1%}", flush=True)


def train(folder: Path, num_seeds: int, more: list[str]) -> None:
    for seed in range(1, num_seeds + 1):
        if not (folder / f"run-{seed}" / "all_results.json").exists():
            status = main([*RECIPE, *more, f"--seed={seed}", f"--output_dir={folder}/run-{seed}"])
            assert status == 0, f"seed {seed} ended with status {status}"


def count(folder: Path, num_splits: int) -> None:
    kept = [read_block_nats(path / BLOCK_NATS)["last"].sets for path in sorted(folder.glob("run-*"))]
    sets = [next(iter(found.values())) for found in kept]
    nats, targets = np.stack([found.nats for found in sets]).astype(float), sets[0].targets
    losses = nats.sum(1) / targets.sum()
    print(f"{len(nats)} runs, {nats.shape[1]:,} blocks of {targets[0]} targets")
    print(f"validation loss {losses.mean():.4f}, standard deviation over seeds {losses.std(ddof=1):.4f}")
    generator = np.random.default_rng(0)
    for each in (1, 2, 3, 5, 10):
        if 2 * each > len(nats):
            break
        covers = {"with seeds": [], "text alone": [], NAIVE: []}
        widths = []
        for _ in range(num_splits):
            chosen = generator.permutation(len(nats))[: 2 * each]
            first, second = nats[chosen[:each]], nats[chosen[each:]]
            found = difference(first, second, targets)
            per_block = (second.mean(0) - first.mean(0)) / targets
            naive = 1.96 * per_block.std(ddof=1) / len(per_block) ** 0.5
            of_text = difference(first.mean(0)[None], second.mean(0)[None], targets)
            covers["text alone"].append(abs(found.value) <= of_text.half_width)
            covers[NAIVE].append(abs(found.value) <= naive)
            if each > 1:
                covers["with seeds"].append(abs(found.value) <= found.half_width)
            widths.append(found.half_width)
        shares = ", ".join(f"{name} {np.mean(values):.1%}" for name, values in covers.items() if values)
        print(f"{each} against {each}, {num_splits:,} splits: zero is covered: {shares}; +- {np.mean(widths):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--splits", type=int, default=2000)
    parser.add_argument("--times", type=int, default=4000, help="simulations of each kind")
    parser.add_argument("--output_dir", type=Path, help="folder for the runs; without it, none are made")
    options, more = parser.parse_known_args()
    simulate(options.times)
    if options.output_dir:
        train(options.output_dir, options.seeds, more)
        count(options.output_dir, options.splits)
