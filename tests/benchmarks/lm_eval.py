"""The named perplexities of one text, beside those of lm-evaluation-harness: same model, text and windows.

python -m venv LM_EVAL && LM_EVAL/bin/pip install "lm_eval[hf]==0.4.13"
python tests/benchmarks/lm_eval.py --models runs/quickstart --text test.txt --lm_eval LM_EVAL/bin/python

Both get the file as one document. lm-eval puts a prefix token before it, and predicts the document in windows of L
tokens, each from the token before it on: its max_length. That is a block of L + 1 tokens here, moved by a stride of L.
Two differences are left. The first token of the text, which has nothing before it here unless the tokenizer puts a
token there: lm-eval predicts it from its prefix token, here it has the mean of the others. And the last window, which
lm-eval fills up with tokens before it as context.

lm-eval counts one word more for white space at each end of a document.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("bits_per_byte", "word_perplexity")
TASK = """
task: one_document
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def run(command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def of_train_loop(model, folder, length):
    """all_results.json of an evaluation of the folder's texts, a document each."""
    flags = {
        "--model_name_or_path": model,
        "--validation_file": folder / "texts",
        "--output_dir": folder / "ours",
        "--block_size": length + 1,
        "--eval_stride": length,
    }
    flags = [str(word) for flag in flags.items() for word in flag]
    run([sys.executable, "-m", "train_loop.main", "--eval_only", "--named_perplexities", *flags], PYTHONPATH=str(ROOT))
    return json.loads((folder / "ours" / "all_results.json").read_text())


def of_lm_eval(python, model, folder, length):
    """{metric: value} of lm-eval's own task for a document of plain text."""
    text = next((folder / "texts").iterdir()).read_text(encoding="utf-8")
    (folder / "document.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (folder / "one_document.yaml").write_text(TASK.format(path=folder / "document.jsonl"))
    # the tokenizer's own special tokens off: lm-eval puts its prefix token before the text itself
    arguments = f"pretrained={model},max_length={length},dtype=float32,add_bos_token=False"
    command = [python, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--device", "cpu", "--batch_size=8"]
    command += ["--tasks", "one_document", "--include_path", str(folder), "--output_path", str(folder / "theirs")]
    run(command, HF_HOME=str(folder / "cache"))
    (results,) = (folder / "theirs").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["one_document"]
    return {name: found[f"{name},none"] for name in NAMES}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", required=True, help="folders")
    parser.add_argument("--text", type=Path, required=True, help="a file of UTF-8 text")
    parser.add_argument("--lm_eval", required=True, help="a Python that has lm_eval[hf]")
    arguments = parser.parse_args()
    print("| model | max_length | metric | train_loop | lm-eval | difference, relative |\n|---|---|---|---|---|---|")
    for model in arguments.models:
        model = str(Path(model).resolve())
        length = json.loads((Path(model) / "config.json").read_text())
        length = length.get("max_position_embeddings") or length["n_positions"]
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            (folder / "texts").mkdir()
            (folder / "texts" / "document.txt").write_bytes(arguments.text.read_bytes())
            ours = of_train_loop(model, folder, length - 1)
            theirs = of_lm_eval(arguments.lm_eval, model, folder, length - 1)
        # with as many words as lm-eval counts
        num_words = math.log(2) * theirs["bits_per_byte"] * ours["eval_bytes"] / math.log(theirs["word_perplexity"])
        ours["word_perplexity"], words = math.exp(ours["eval_text_nats"] / round(num_words)), f"{round(num_words):,}"
        for name in NAMES:
            metric = f"{name} ({words} words)" if name == "word_perplexity" else name
            difference = ours[name] / theirs[name] - 1
            row = f"{ours[name]:,.6f} | {theirs[name]:,.6f} | {difference:+.1e}"
            print(f"| {Path(model).name} | {length - 1} | {metric} | {row} |", flush=True)


if __name__ == "__main__":
    main()
