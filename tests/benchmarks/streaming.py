"""Streaming a text that is never whole, measured beside the prepared way: memory over a run, and tokens per second.

    python tests/benchmarks/streaming.py --megabytes 1024 --memory_steps 2000 --models small tiny --repetitions 3

1. Memory. A text of --megabytes is made on the spot: pseudo-words, as frequent as Zipf's law has it, in sentences and
   paragraphs, of which no two are the same. One process goes through all of it as the loop does, without a model: the
   resident set is looked at after each twentieth of the text. Then a tiny model is trained on it for --memory_steps.
2. Speed. Streamed and prepared in turn, on the same work: the first blocks of the text in their order (the prepared
   order of blocks is set to that of the data, streaming has shuffling off), each run a process of its own. The losses
   must be the same, bit for bit. The prepared tokens are in the cache: their preparation is not counted. Models:
       distilgpt2   its shape, 82 M parameters: a step takes seconds
       small        4 layers of width 256, blocks of 256
       tiny         1 layer of width 64: the model is nothing, the tokens are everything
   For a shuffled stream the same work is done in another order, and its speed is shown beside.

Tokens per second are over the steps after the first --warm_up, evaluation left out. Without --tokenizer a byte-level
BPE of 8,192 tokens is trained on the text's first lines.
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

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

MODELS = {  # overrides of GPT-2's config, block, batch, steps measured
    "distilgpt2": ("n_layer=6,n_head=12,n_embd=768,n_positions=1024", 128, 8, 12),
    "small": ("n_layer=4,n_head=4,n_embd=256,n_positions=256", 256, 8, 60),
    "tiny": ("n_layer=1,n_head=2,n_embd=64,n_positions=128", 128, 32, 400),
}


def write_text(path, megabytes):
    """Pseudo-words of 1 to 4 syllables, 200,000 of them, the k-th as frequent as 1 / (k + 2.7)."""
    import numpy as np

    generator = np.random.default_rng(0)
    syllables = [c + v + e for c in "bcdfghklmnprstvwz" for v in "aeiou" for e in ("", "n", "r", "s", "l", "m")]
    words = ["".join(generator.choice(syllables, size=generator.integers(1, 5))) for _ in range(200_000)]
    words = np.array(words, dtype=object)
    weights = 1 / (np.arange(len(words)) + 2.7)
    cumulative = np.cumsum(weights / weights.sum())
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes << 20:
            drawn = words[np.searchsorted(cumulative, generator.random(200_000)).clip(max=len(words) - 1)]
            begin = 0
            for length in generator.integers(20, 120, size=2_000):  # words of a line
                line = drawn[begin : begin + length]
                begin += length
                if not len(line):
                    break
                file.write(" ".join(line).capitalize() + ".\n")


def resident_set():
    """MB of memory that this process has at present."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def go_through(arguments):
    """All windows of a stream, without a model: (MB resident, MB of text read, seconds) at some points."""
    from types import SimpleNamespace

    import torch

    from train_loop import model
    from train_loop.data import sources, streaming
    from train_loop.position import Place
    from train_loop.settings import command_line

    settings = command_line.read_settings(arguments)
    source = sources.load_source(settings)[0]
    stream = streaming.Stream(source, model.load_tokenizer(settings, None), settings)
    points, tokens, began = [], 0, time.perf_counter()
    size = sum(size for size, _ in source.files.seen.values())
    one = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    for window in stream.windows(Place(), settings, one):
        tokens += window.tensors["input_ids"].numel()
        byte = window.end.stream["place"][1]
        if byte >= size * len(points) / 20:  # of a group, this is the place where it begins
            points.append((resident_set(), byte / 1e6, time.perf_counter() - began))
    points.append((resident_set(), size / 1e6, time.perf_counter() - began))
    return {"points": points, "tokens": tokens, "seconds": time.perf_counter() - began}


def train(arguments, every=50):
    """A run of train_loop in this process; with streaming off its blocks are in the order of the data."""
    import numpy as np

    from train_loop import main
    from train_loop.data import blocks as data
    from train_loop.report import metrics

    data.block_order = lambda blocks, seed, epoch: np.arange(len(blocks))
    points, count_step = [], metrics.Metrics.count_step

    def watched(self, step, *values):
        if step % every == 0:
            points.append((step, resident_set()))
        return count_step(self, step, *values)

    metrics.Metrics.count_step = watched
    assert main.main(arguments) == 0
    return {"points": points}


def in_a_process(function, arguments):
    command = [sys.executable, __file__, "--child", function, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def lines_of(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def speed_of(lines, warm_up):
    """Tokens per second after the step `warm_up`, and the losses of all lines."""
    lines = [line for line in lines if "loss" in line]
    counted = [line for line in lines if line["step"] > warm_up]
    tokens = counted[-1]["tokens_seen"] - next(line["tokens_seen"] for line in lines if line["step"] == warm_up)
    first = [line for line in lines if line["step"] <= warm_up][-1]
    seconds = sum(
        (line["tokens_seen"] - before["tokens_seen"]) / line["tokens_per_second"]
        for before, line in zip([first, *counted], counted, strict=False)
    )
    return tokens / seconds, [line["loss"] for line in lines]


def main_(options, folder):
    text, valid = Path(options.text or folder / "text.txt"), folder / "valid.txt"
    if not text.exists():
        write_text(text, options.megabytes)
    with open(text, encoding="utf-8") as file:
        some = [next(file) for _ in range(4_000)]
    valid.write_text("".join(some[:60]), encoding="utf-8")
    tokenizer = options.tokenizer
    if not tokenizer:
        from train_loop import model
        from train_loop.data.rows import Rows
        from train_loop.settings import settings as config

        tokenizer = folder / "tokenizer"
        rows = Rows.of(some)
        model.load_tokenizer(config.Settings(tokenizer_vocab_size=8192), rows).save_pretrained(tokenizer)
    print(f"text: {text.stat().st_size / 1e6:,.0f} MB")

    def arguments(name, kind, output_dir, text=text, steps=None):
        overrides, block, batch, num_steps = MODELS[name]
        num_steps = steps or num_steps + options.warm_up
        words = ["--model_type=gpt2", f"--config_overrides={overrides}", f"--tokenizer_name={tokenizer}"]
        words += [f"--train_file={text}", f"--validation_file={valid}", f"--block_size={block}"]
        words += [f"--per_device_train_batch_size={batch}", f"--max_train_steps={num_steps}", "--max_eval_samples=4"]
        words += [f"--logging_steps={options.warm_up}", "--checkpointing_steps=none", f"--output_dir={output_dir}"]
        if kind != "prepared":
            words += ["--streaming", f"--shuffle_buffer_size={10_000 if kind == 'shuffled' else 0}"]
        return words

    if options.memory_steps:
        whole = in_a_process("go_through", arguments("tiny", "shuffled", folder / "none"))
        for megabytes, read, seconds in whole["points"]:
            print(f"  read {read:7,.0f} MB  resident {megabytes:7,.1f} MB  after {seconds:6.1f} s", flush=True)
        print(f"all of it: {whole['tokens']:,} tokens, {whole['tokens'] / whole['seconds']:,.0f} tokens/s, no model")
        words = arguments("tiny", "shuffled", folder / "memory", steps=options.memory_steps)
        for step, megabytes in in_a_process("train", words)["points"]:
            if step % max(50, options.memory_steps // 20 // 50 * 50) == 0:
                print(f"  trained {step:6,} steps  resident {megabytes:7,.1f} MB", flush=True)

    part = folder / "part.txt"  # enough for the steps below, so that the prepared way need not prepare all
    with open(text, encoding="utf-8") as file, open(part, "w", encoding="utf-8") as out:
        out.write(file.read(options.part_megabytes << 20))
        out.write("\n")
    for name in options.models:
        speeds = {"prepared": [], "streamed": [], "shuffled": []}
        for repetition in range(options.repetitions + 1):  # the first one fills the cache
            losses = {}
            for kind in speeds:
                output_dir = folder / f"{name}-{kind}-{repetition}"
                in_a_process("train", arguments(name, kind, output_dir, part))
                speed, losses[kind] = speed_of(lines_of(output_dir), options.warm_up)
                if repetition:
                    speeds[kind].append(speed)
            assert losses["prepared"] == losses["streamed"], "not the same work"
        ratios = {
            kind: [mine / prepared for mine, prepared in zip(speeds[kind], speeds["prepared"], strict=True)]
            for kind in ("streamed", "shuffled")
        }
        for kind, values in speeds.items():
            ratio = (
                f"  x prepared: {statistics.median(ratios[kind]):.3f} {sorted(ratios[kind])}" if kind in ratios else ""
            )
            print(f"{name:<11} {kind:<9} {statistics.median(values):9,.0f} tokens/s{ratio}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(globals()[sys.argv[2]](json.loads(sys.argv[3]))))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="of text")
    parser.add_argument("--text", help="a text to take instead")
    parser.add_argument("--tokenizer", help="a folder with a tokenizer, e.g. GPT-2's")
    parser.add_argument("--memory_steps", type=int, default=2000, help="of the tiny model; 0: memory is not measured")
    parser.add_argument("--models", nargs="*", default=["small", "tiny"], choices=MODELS)
    parser.add_argument("--part_megabytes", type=int, default=32, help="of the text that the speed is measured with")
    parser.add_argument("--warm_up", type=int, default=4, help="steps before counting begins")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streaming_") as folder:
        os.environ |= {"HF_HOME": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        main_(options, Path(folder))
