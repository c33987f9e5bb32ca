"""Preparing data, measured beside the usual two `datasets.map`s and beside the tokenizer alone.

    python tests/benchmarks/preparation.py --text train.txt --tokenizer FOLDER --times 1 10 --json out.json

Every figure is from a fresh process, and what is compared runs in turn:

    ours         `load_rows` and `load_split` of a text file, with an empty cache
    ours again   the same, with the cache that this left
    maps         a `datasets` set of the file's lines through two maps with num_proc=4, with an empty cache: the
                 tokenizer over the rows, then blocks and labels cut from each 1,000 rows. Reading the file before
                 (`load_dataset`) is measured too, and kept out of the ratio
    maps again   the same, with the cache that this left
    tokenizer    the tokenizer's `encode_batch_fast` over the lines, 1,000 at a time, nothing kept; reading not counted

Imports and the loading of the tokenizer are not counted. Memory is the highest resident set of a process of its own or
of a child of it, less its own resident set before. The tokens must be the same; lines of white space are left out where
they are compared, since here they have no tokens. --times 10 measures a text of ten times the size: copies of the file,
in each of them the words of every line rotated differently, so that no line is there twice.

Without --text and --tokenizer: the prose that comes with Python, and a tokenizer trained on it.
"""

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

BLOCK = 128
KINDS = ("ours", "ours again", "maps", "maps again", "tokenizer")


def resident_set():
    """Bytes of memory that this process has at present; its record is forgotten."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest_resident_set():
    """Bytes, of this process since `resident_set` or of a child that has ended."""
    import resource

    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * max(int(line.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def cpu_seconds():
    """Of this process, all its threads, and its children that have ended."""
    import resource

    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def digest_of(arrays):
    import numpy as np

    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype=np.int32))
    return digest.hexdigest()


def ours(text, load_tokenizer, result):
    from train_loop.data.blocks import load_split
    from train_loop.data.rows import load_rows
    from train_loop.settings.settings import Settings

    settings = Settings(validation_file=str(text), eval_only=True, block_size=BLOCK)
    tokenizer = load_tokenizer()
    before, start, used = resident_set(), time.perf_counter(), cpu_seconds()
    _, rows, _ = load_rows(settings)
    result["reading"] = time.perf_counter() - start
    split = load_split(rows, tokenizer, "validation", settings)
    result |= {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - used}
    result["memory"] = highest_resident_set() - before
    result |= {"tokens": split.num_tokens, "blocks": len(split.blocks)}
    if result["compare"]:
        result["digest"] = digest_of([split.blocks.base])


def maps(text, load_tokenizer, result):
    import datasets

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer()

    def tokenize(batch):
        return tokenizer(batch["text"])

    def cut(batch):
        columns = {name: [token for row in rows for token in row] for name, rows in batch.items()}
        length = len(columns["input_ids"]) // BLOCK * BLOCK
        columns = {
            name: [column[start : start + BLOCK] for start in range(0, length, BLOCK)]
            for name, column in columns.items()
        }
        columns["labels"] = columns["input_ids"].copy()
        return columns

    before, start = resident_set(), time.perf_counter()
    lines = datasets.load_dataset("text", data_files={"train": str(text)}, split="train", keep_linebreaks=True)
    result["reading"] = time.perf_counter() - start
    start, used = time.perf_counter(), cpu_seconds()
    tokens = lines.map(tokenize, batched=True, num_proc=4, remove_columns=["text"])
    blocks = tokens.map(cut, batched=True, num_proc=4)
    result |= {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - used}
    result["memory"] = highest_resident_set() - before
    result["blocks"] = len(blocks)
    if result["compare"]:
        rows = zip(lines["text"], tokens["input_ids"], strict=True)
        result["digest"] = digest_of(ids for line, ids in rows if not line.isspace())


def tokenizer(text, load_tokenizer, result):
    backend = load_tokenizer().backend_tokenizer
    lines = ["" if line.isspace() else line for line in text.read_text(encoding="utf-8").splitlines(keepends=True)]
    start, used = time.perf_counter(), cpu_seconds()
    for first in range(0, len(lines), 1000):
        backend.encode_batch_fast(lines[first : first + 1000])
    result |= {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - used}


def work(kind, text, folder, compare):
    """One measurement, in this process; prints the result as JSON."""
    from transformers import AutoTokenizer

    result = {"kind": kind, "compare": compare}
    measure = {"ours": ours, "maps": maps, "tokenizer": tokenizer}[kind.split()[0]]
    measure(text, lambda: AutoTokenizer.from_pretrained(folder), result)
    print(json.dumps(result))


def several_times(text, times, path):
    """`text` copied `times` times to `path`, the words of a line rotated by one more in each copy."""
    with open(path, "w", encoding="utf-8") as file:
        for shift in range(times):
            for line in text.read_text(encoding="utf-8").splitlines():
                words = line.split(" ")
                shifted = shift % len(words)
                file.write(" ".join(words[shifted:] + words[:shifted]) + "\n")


def prepare(arguments, folder):
    """The text and the tokenizer's folder that are asked for."""
    from transformers import GPT2TokenizerFast

    from train_loop.data.rows import load_rows
    from train_loop.model import load_tokenizer
    from train_loop.settings.settings import Settings

    text, given = folder / "prose.txt", arguments.tokenizer
    if arguments.text:
        text = arguments.text
    else:
        rows, _, _ = load_rows(Settings(dataset_name="python_docs"))
        text.write_text("".join(row["text"] for row in rows) * 4, encoding="utf-8")
    if given and (given / "merges.txt").is_file() and not (given / "tokenizer.json").is_file():
        tokenizer = GPT2TokenizerFast(vocab=str(given / "vocab.json"), merges=str(given / "merges.txt"))
    elif given:
        return text, given
    else:
        rows, _, _ = load_rows(Settings(dataset_name="python_docs"))
        tokenizer = load_tokenizer(Settings(tokenizer_vocab_size=4096), rows)
    tokenizer.save_pretrained(folder / "tokenizer")
    return text, folder / "tokenizer"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--compare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.work, arguments.text, arguments.tokenizer, arguments.compare)
    with tempfile.TemporaryDirectory(prefix="preparation_") as folder:
        folder = Path(folder)
        source, tokenizer = prepare(arguments, folder)
        sizes = {times: folder / f"text{times}.txt" for times in arguments.times}
        for times, path in sizes.items():
            several_times(source, times, path)
        results = []
        for repetition in range(arguments.repetitions):
            for times, text in sizes.items():
                with tempfile.TemporaryDirectory(dir=folder) as cache:
                    for kind in KINDS:
                        command = [sys.executable, __file__, "--work", kind, "--text", text, "--tokenizer", tokenizer]
                        command += ["--compare"] * (repetition == 0)
                        environment = os.environ | {"HF_HOME": cache, "HF_HUB_OFFLINE": "1"}
                        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                        result = json.loads(done.stdout.splitlines()[-1])
                        results.append(result | {"times": times, "bytes": text.stat().st_size})
                        print(f"{repetition + 1}  {times:3} x  {kind:11} {result['seconds']:8.2f} s", file=sys.stderr)
                if repetition == 0:
                    digests = {result["digest"] for result in results[-5:-1]}
                    assert len(digests) == 1, "the tokens differ"
    show(results, arguments.json)


def show(results, path):
    summary = []
    for times in sorted({result["times"] for result in results}):
        chosen = {k: [r for r in results if r["times"] == times and r["kind"] == k] for k in KINDS}
        num_bytes, num_tokens = chosen["ours"][0]["bytes"], chosen["ours"][0]["tokens"]
        print(f"\n{num_bytes / 1e6:.1f} MB, {num_tokens:,} tokens, the same in all; blocks of {BLOCK}: ", end="")
        print(f"{chosen['ours'][0]['blocks']:,} here, {chosen['maps'][0]['blocks']:,} from the maps")
        print(f"{'seconds':24}{'min':>9}{'median':>9}{'max':>9}   memory, highest")
        row = {"bytes": num_bytes, "tokens": num_tokens}
        for kind in KINDS:
            seconds = sorted(result["seconds"] for result in chosen[kind])
            row[kind] = {"min": seconds[0], "median": statistics.median(seconds), "max": seconds[-1]}
            print(f"{kind:24}" + "".join(f"{value:9.2f}" for value in row[kind].values()), end="")
            if kind != "tokenizer":
                row[kind]["memory"] = max(result["memory"] for result in chosen[kind])
                print(f"{row[kind]['memory'] / 1e6:12,.0f} MB", end="")
            print()
        for peer, what in itertools.product(("maps", "tokenizer"), ("seconds", "cpu_seconds")):
            # of each repetition by itself: its processes ran one after the other, whatever else the machine did then
            ratios = sorted(a[what] / b[what] for a, b in zip(chosen["ours"], chosen[peer], strict=True))
            name = f"ours / {peer}" + ", CPU" * (what == "cpu_seconds")
            row[name] = {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]}
            print(f"{name:24}" + "".join(f"{ratio:9.2f}" for ratio in row[name].values()))
        reading = statistics.median(result["reading"] for result in chosen["maps"])
        print(f"load_dataset before the maps, not counted: {reading:.2f} s")
        summary.append(row)
    if path:
        path.write_text(json.dumps({"summary": summary, "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
