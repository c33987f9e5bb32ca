"""What a run prints: lines that fit, nothing but text where there is no terminal, and no warning."""

import re

from conftest import TINY, TWO, run
from forks import forked

SHORT = ["--max_train_steps=4", "--logging_steps=2", "--checkpointing_steps=2"]
TABLE_HEAD = r"step +epoch train loss +eval loss perplexity +tokens/s"


def assert_plain(done, *paths):
    """Exit status 0, no warning, no bar, no colour, and no line over 80 columns but for one with a path in it."""
    assert done.returncode == 0, done.stderr
    # with torch 2.15 and Python 3.13, whatever imports triton prints this at its end
    errors = re.sub(r"nanobind: leaked .*/refleaks\.html\n?", "", done.stderr, flags=re.DOTALL)
    assert "warning" not in (done.stdout + errors).lower() and errors == ""
    assert not re.search(r"[\r\x1b]", done.stdout)
    too_long = [line for line in done.stdout.splitlines() if len(line) > 80 and not any(p in line for p in paths)]
    assert not too_long


def test_two_processes_and_an_evaluation_print_plain_lines_of_80_columns_and_no_warning(text_file, tmp_path):
    """Data and tokens are prepared anew, as they are the first time."""
    out, paths = tmp_path / "run", (str(tmp_path), str(text_file))
    arguments = [*TINY, *SHORT, f"--train_file={text_file}", f"--output_dir={out}", "--resume_from_checkpoint=auto"]
    trained = run("train_loop/main.py", *arguments, launcher=TWO, HF_HOME=str(tmp_path / "cache"))
    assert_plain(trained, *paths)
    assert len(re.findall(TABLE_HEAD, trained.stdout)) == 1 and "world size 2" in trained.stdout

    files = [f"--model_name_or_path={out}", f"--validation_file={text_file}", "--block_size=32"]
    evaluated = forked("-m", "train_loop.main", *files, "--eval_only", "--named_perplexities", NO_COLOR="1")
    assert_plain(evaluated, *paths)
    assert re.search(r"^perplexity +[\d.]+$", evaluated.stdout, re.MULTILINE)
