"""A recipe beside the reference recipe, on models that stand in for theirs: losses with intervals, and tokens.

    python tests/benchmarks/recipes.py text --folder docs
    python tests/benchmarks/recipes.py train --folder runs/small --recipe distilgpt2_wikitext2 --seeds 1 2 3 \
        --model_name_or_path MODEL --train_file train.txt --validation_file valid.txt
    python tests/benchmarks/recipes.py train --folder runs/small --recipe distilgpt2_wikitext2_fast --seeds 1 2 3 ...
    python tests/benchmarks/recipes.py table --folder runs/small

`text` collects prose from the documentation of this machine (train.txt, held_out.txt) and trains a tokenizer on it.
`train` runs the recipe as it is written, but for model and data, once for each seed, in the folder NAME-SEED (--name;
else the recipe's name). Arguments that it does not know go to the run. A finished run is left as it is, another one is
resumed. `table` prints all runs of the folders; the reference is the recipe called distilgpt2_wikitext2.
"""

import argparse
import ast
import gzip
import html
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from train_loop.compare import difference
from train_loop.report import BLOCK_NATS, read_block_nats, read_lines

ROOT = Path(__file__).parent.parent.parent
REFERENCE = "distilgpt2_wikitext2"
OF_ITS_OWN = ("model_name_or_path", "dataset_name", "dataset_config_name", "output_dir")
DOCUMENTATION = ("/usr/share", "/usr/lib", sys.base_prefix, sys.prefix)
COMMON = re.compile(r"\b(the|a|of|to|and|in|is|for|be|that|this|it|with|as|on|or|by|are|if|not)\b", re.IGNORECASE)


def train(folder: Path, recipe: str, name: str, seeds: list[int], more: list[str]) -> None:
    settings = yaml.safe_load((ROOT / "train_loop" / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key not in OF_ITS_OWN}))
    for seed in seeds:
        output = folder / f"{name}-{seed}"
        if not (output / "all_results.json").exists():
            command = [sys.executable, "-m", "train_loop.main", f"--config={config}", f"--seed={seed}"]
            command += [f"--output_dir={output}", "--resume_from_checkpoint=auto", *more]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def table(folders: list[Path]) -> None:
    print("stand-in, recipe: runs, tokens, loss before -> after, minus the reference's, share of tokens (to its loss)")
    for folder in folders:
        found: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("*-*/all_results.json")):
            found.setdefault(path.parent.name.rpartition("-")[0], []).append(path.parent)
        if REFERENCE not in found:
            sys.exit(f"{folder} has no finished run of {REFERENCE}")
        reference = [last_nats(run) for run in found[REFERENCE]]
        targets = reference[0].targets
        goal = np.mean([one.nats.sum() for one in reference]) / targets.sum()
        goal_tokens = results(found[REFERENCE][0])["train_tokens"]
        for name, runs in found.items():
            nats = np.stack([last_nats(run).nats for run in runs])
            against = difference(np.stack([one.nats for one in reference]), nats, targets)
            lines = [[line for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line] for run in runs]
            share = results(runs[0])["train_tokens"] / goal_tokens
            reached = []
            for of_run in lines:
                steps = [line["step"] for line in of_run if line["eval_loss"] <= goal]
                reached.append(share * steps[0] / of_run[-1]["step"] if steps else None)
            to_it = "not reached" if None in reached else f"{max(r for r in reached if r is not None):.2f}"
            course = " ".join(f"{line['eval_loss']:.4f}" for line in lines[0][1:])
            print(
                f"{folder.name}, {name}: {len(runs)}, {results(runs[0])['train_tokens']:,}, "
                f"{lines[0][0]['eval_loss']:.4f} -> {nats.sum(1).mean() / targets.sum():.4f}, "
                f"{against.value:+.4f} +- {against.half_width:.4f}, {share:.2f} ({to_it}); "
                f"while training {course}"
            )


def last_nats(run: Path):
    return next(iter(read_block_nats(run / BLOCK_NATS)["last"].sets.values()))


def results(run: Path) -> dict:
    return json.loads((run / "all_results.json").read_text(encoding="utf-8"))


def text(folder: Path, megabytes: float, vocab_size: int) -> None:
    """Paragraphs of English prose, each once, in pieces of 100 in random order; a fiftieth is held out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    paragraphs = list(dict.fromkeys(p for root in dict.fromkeys(DOCUMENTATION) for p in prose_below(root)))
    pieces = [paragraphs[i : i + 100] for i in range(0, len(paragraphs), 100)]
    random.Random(0).shuffle(pieces)
    kept, size = [], 0
    while pieces and size < megabytes * 1e6:
        size += sum(map(len, pieces[-1]))
        kept += pieces.pop()
    folder.mkdir(parents=True, exist_ok=True)
    held_out = len(kept) // 50
    for name, rows in (("train.txt", kept[:-held_out]), ("held_out.txt", kept[-held_out:])):
        (folder / name).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train([str(folder / "train.txt")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    print(f"{len(kept):,} paragraphs, {size / 1e6:.1f} MB, of {len(paragraphs):,}")


def prose_below(root: str):
    """Paragraphs of the manual pages, text files and docstrings below `root`. Not tests, which have data."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if "test" not in name and "wikitext" not in name)
        for name in sorted(names):
            path = Path(folder, name)
            try:
                if "/man/man" in folder and not name.startswith("gcloud"):
                    raw = path.read_bytes()
                    found = manual((gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8", "replace"))
                elif name.endswith((".md", ".rst", ".txt")):
                    found = path.read_text(encoding="utf-8", errors="replace")
                elif name.endswith(".py"):
                    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
                    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace")))
                    found = "\n\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
                else:
                    continue
            except (OSError, EOFError, SyntaxError, ValueError, RecursionError):
                continue
            yield from filter(is_prose, (" ".join(part.split()) for part in re.split(r"\n\s*\n", html.unescape(found))))


def is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    return (
        len(paragraph) >= 80
        and paragraph.isascii()
        and max(map(len, words)) <= 40
        and sum(c.isalpha() or c == " " for c in paragraph) >= 0.9 * len(paragraph)
        and len(COMMON.findall(paragraph)) >= 0.15 * len(words)
    )


def manual(source: str) -> str:
    """The text of a page in roff: a request ends a paragraph, escapes are left out."""
    lines = ["" if line[:1] in (".", "'") else line for line in source.split("\n")]
    return re.sub(r"\\f(\[\w*\]|\(..|.)|\\[&|^/,]|\\\(..|\\s[+-]?\d", "", "\n".join(lines)).replace("\\-", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["text", "train", "table"])
    parser.add_argument("--folder", type=Path, nargs="+", required=True)
    parser.add_argument("--recipe", default=REFERENCE)
    parser.add_argument("--name", help="what the runs are called; else as the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--megabytes", type=float, default=28)
    parser.add_argument("--vocab_size", type=int, default=8192)
    options, more = parser.parse_known_args()
    if options.what == "table":
        table(options.folder)
    elif options.what == "train":
        train(options.folder[0], options.recipe, options.name or options.recipe, options.seeds, more)
    else:
        text(options.folder[0], options.megabytes, options.vocab_size)


if __name__ == "__main__":
    main()
