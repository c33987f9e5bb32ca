"""Trains one recipe with many seeds, splits the runs at random into two "recipes", and counts how often the interval of
their difference covers zero, which is the truth.

python tests/benchmarks/seeds.py --seeds 20 --output_dir runs/seeds
python tests/benchmarks/seeds.py --output_dir runs/seeds --only_count     # once more, of the same runs

Further arguments go to the runs. By default they are 150 steps of a small GPT-2 on the texts that Python carries, about
15 s each on one core.
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
    "--max_train_steps=150",
    "--eval_delay=1",
    "--eval_steps=150",
    "--checkpointing_steps=none",
    "--num_threads=1",
]


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
        covers = {"with seeds": [], "text alone": [], "blocks as if independent": []}
        widths = []
        for _ in range(num_splits):
            chosen = generator.permutation(len(nats))[: 2 * each]
            first, second = nats[chosen[:each]], nats[chosen[each:]]
            found = difference(first, second, targets)
            per_block = (second.mean(0) - first.mean(0)) / targets
            naive = 1.96 * per_block.std(ddof=1) / len(per_block) ** 0.5
            covers["text alone"].append(abs(found.value) <= found.from_text)
            covers["blocks as if independent"].append(abs(found.value) <= naive)
            if each > 1:
                covers["with seeds"].append(abs(found.value) <= found.half_width)
            widths.append(found.half_width)
        shares = ", ".join(f"{name} {np.mean(values):.1%}" for name, values in covers.items() if values)
        print(f"{each} against {each}, {num_splits:,} splits: zero is covered: {shares}; +- {np.mean(widths):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--splits", type=int, default=2000)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--only_count", action="store_true")
    options, more = parser.parse_known_args()
    if not options.only_count:
        train(options.output_dir, options.seeds, more)
    count(options.output_dir, options.splits)
