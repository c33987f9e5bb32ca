"""Prompts and chats, beside TRL's SFTTrainer: the same labels, the same losses, and the time that preparing them takes.

    python -m pip install trl
    PYTHONPATH=. python tests/benchmarks/chats.py labels                # labels and losses of some rows
    PYTHONPATH=. python tests/benchmarks/chats.py preparation --rows 25000 100000

`labels` compares every token and label of each row, and the losses of 20 steps of a tiny Llama without dropout, with
the same rows in the same micro-batches (`packing` false here, padding there). TRL finds the assistant's turns of a chat
by the template's generation marks alone; of the other templates it gets a chat as a prompt and its completion.

`preparation` prepares chats of the same content with `load_rows` and `load_split`, and as SFTTrainer's constructor
does, each in a fresh process with an empty cache, and in turn. The tokenizer has 4,096 tokens, of the
prose that comes with Python. Imports, the tokenizer and the model are not counted.
Memory is the highest resident set of the process or of a child of it, less the process's own before.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from chat_templates import CHATML, MARKED, TEMPLATES, byte_tokenizer, messages

WORDS = "the value of a name is what it was bound to when this code ran last"


def sentence(generator, num_words):
    return " ".join(generator.choices(WORDS.split(), k=num_words))


def chats(num_rows, seed=0, num_words=12):
    """Chats of one to three turns, some with a system message."""
    generator = random.Random(seed)
    for i in range(num_rows):
        contents = [sentence(generator, generator.randint(2, num_words)) + "?."[i % 2] for _ in range(2 + 2 * (i % 3))]
        yield messages(*contents, system="Answer shortly." if i % 4 == 0 else None)


def tiny_llama(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes))


def trainer_of(rows, tokenizer, folder, **more):
    """TRL's SFTTrainer of these rows."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=20,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        **{"max_length": 2048, **more},
    )
    rows = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    return SFTTrainer(tiny_llama(tokenizer), arguments, train_dataset=rows, processing_class=tokenizer)


def our_rows(rows, tokenizer, folder, block_size):
    """(the `Split` of these rows, of each row a list of (id, label))."""
    from train_loop.data import load_file, load_split
    from train_loop.data.blocks import inputs_and_labels
    from train_loop.settings.settings import Settings

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = Settings(train_file=str(path), block_size=block_size, packing=False)
    split = load_split(load_file(path, settings), tokenizer, "training", settings)
    inputs = inputs_and_labels(split.blocks)
    return split, [
        [*zip(ids.tolist(), labels.tolist(), strict=True)] for ids, labels in zip(*inputs.values(), strict=True)
    ]


def our_losses(split, tokenizer, folder):
    """Of 20 steps with 4 rows each, in the order of the rows."""
    from conftest import train

    from train_loop.data import blocks

    blocks.block_order = lambda rows, seed, epoch: list(range(len(rows)))
    options = {"max_train_steps": 20, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    lines, _, _ = train(tiny_llama(tokenizer), split, split.blocks[:1], folder / "ours", eval_steps=1000, **options)
    return [line["loss"] for line in lines]


def compare_labels():
    import trl

    pairs = [
        {"prompt": f"{sentence(random.Random(i), 5)}{' ' * (i % 5 == 0)}", "completion": f"{' ' * (i % 3 == 0)}is {i}."}
        for i in range(80)
    ]
    whole = [*chats(80)]
    halves = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in whole]
    merges = [("Ġ", "i"), ("Ġi", "s")]  # a prompt that ends with a space does not end with a token
    cases = {"prompt + completion": (pairs, byte_tokenizer(merges=merges), {})}
    for name, template in TEMPLATES.items():
        cases[f"{name}, as prompt + completion"] = halves, byte_tokenizer(template), {}
    # the last is a template without marks that TRL marks by itself; here the turns are found by differences
    of_trl = (Path(trl.__file__).parent / "chat_templates" / "llama3.jinja").read_text(encoding="utf-8")
    for name, template in {"marked": MARKED, "TRL's llama3": of_trl}.items():
        tokenizer = byte_tokenizer(template)
        tokenizer.bos_token = "<|begin|>"
        cases[f"{name}, as messages"] = [{"messages": c} for c in whole], tokenizer, {"assistant_only_loss": True}
    for name, (rows, tokenizer, more) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            trainer = trainer_of(rows, tokenizer, folder / "trl", train_sampling_strategy="sequential", **more)
            theirs = [[*zip(row["input_ids"], row["labels"], strict=True)] for row in trainer.train_dataset]
            longest = max(map(len, theirs))
            split, ours = our_rows(rows, tokenizer, folder, longest)
            filler = (tokenizer.eos_token_id, -100)
            assert ours == [row + [filler] * (longest - len(row)) for row in theirs], f"{name}: labels differ"
            trainer.train()
            losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
            pairs_of_losses = [*zip(losses, our_losses(split, tokenizer, folder), strict=True)]
            difference = max(abs(one - other) for one, other in pairs_of_losses)
            num_targets = sum(label != -100 for row in theirs for _, label in row)
            print(
                f"{name:32} {len(rows)} rows, {sum(map(len, theirs)):,} tokens, {num_targets:,} of them targets: "
                f"labels equal; {split.counts.num_merged} prompts end within a token; losses {losses[0]:.4f} to "
                f"{losses[-1]:.4f}, differ by at most {difference:.1e}",
                flush=True,
            )


def resident(who=None):
    """GiB: now, or at most."""
    if who is None:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    return resource.getrusage(who).ru_maxrss / 2**20


def prepare(kind, path, folder):
    """One measurement, in this process; prints the result as JSON."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent / "tokenizer")
    tokenizer.chat_template = CHATML if kind == "ours, by differences" else MARKED
    if kind == "trl":
        import datasets

        rows = datasets.load_dataset("json", data_files=str(path), split="train")
        trainer_of(rows.select(range(8)), tokenizer, folder / "warm", assistant_only_loss=True)
        before, start = resident(), time.perf_counter()
        trainer = trainer_of(rows, tokenizer, folder / "trl", assistant_only_loss=True, dataset_num_proc=2)
        seconds, num_rows = time.perf_counter() - start, len(trainer.train_dataset)
    else:
        from train_loop.data import load_file, load_split
        from train_loop.settings.settings import Settings

        settings = Settings(train_file=str(path), block_size=512)
        before, start = resident(), time.perf_counter()
        split = load_split(load_file(path, settings), tokenizer, "training", settings)
        seconds, num_rows = time.perf_counter() - start, split.num_rows
    highest = max(resident(resource.RUSAGE_SELF), resident(resource.RUSAGE_CHILDREN))
    print(json.dumps({"kind": kind, "rows": num_rows, "seconds": seconds, "memory": highest - before}))


def compare_preparation(arguments):
    results = []
    from train_loop.data import load_rows
    from train_loop.model import load_tokenizer
    from train_loop.settings.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        rows, _, _ = load_rows(Settings(dataset_name="python_docs"))
        load_tokenizer(Settings(tokenizer_vocab_size=4096), rows).save_pretrained(Path(folder) / "tokenizer")
        for num_rows in arguments.rows:
            path = Path(folder) / f"{num_rows}.jsonl"
            with open(path, "w", encoding="utf-8") as file:
                for i, chat in enumerate(chats(num_rows, num_words=40)):
                    file.write(json.dumps({"id": i, "messages": chat}) + "\n")
            print(f"{num_rows:,} rows, {path.stat().st_size / 1e6:.1f} MB")
            for _, kind in itertools.product(range(arguments.repetitions), arguments.kinds):
                with tempfile.TemporaryDirectory(dir=folder) as cache:
                    done = subprocess.run(
                        [sys.executable, __file__, "preparation", "--work", kind, "--file", path, "--folder", cache],
                        env={**os.environ, "HF_HOME": cache, "HF_HUB_OFFLINE": "1"},
                        capture_output=True,
                        text=True,
                    )
                assert done.returncode == 0, done.stderr[-2000:]
                results.append(json.loads(done.stdout.splitlines()[-1]))
                of_it = results[-1]
                print(
                    f"{kind:22} {of_it['seconds']:7.2f} s, {of_it['rows'] / of_it['seconds']:9,.0f} rows/s, "
                    f"{of_it['memory']:5.2f} GiB more",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


KINDS = ("ours, by marks", "ours, by differences", "trl")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("labels", "preparation"))
    parser.add_argument("--rows", type=int, nargs="+", default=[25_000, 100_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--json", type=Path)
    for name in ("--work", "--file", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        prepare(arguments.work, Path(arguments.file), Path(arguments.folder))
    elif arguments.what == "labels":
        compare_labels()
    else:
        compare_preparation(arguments)


if __name__ == "__main__":
    main()
