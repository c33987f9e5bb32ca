"""What a run prints: lines that fit, nothing but text where there is no terminal, and no warning."""

import re

from conftest import ROOT, run
from test_checkpoint import LAUNCH
from test_main import TINY

SHORT = ["--max_train_steps=4", "--logging_steps=2", "--checkpointing_steps=2"]
QUIET_NUMBERS = r"step +epoch train loss +eval loss perplexity +tokens/s"


def assert_plain(done, *paths):
    """Exit status 0, no warning, no bar, no colour, and no line over 80 columns but for one with a path in it."""
    assert done.returncode == 0, done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower() and done.stderr == ""
    assert not re.search(r"[\r\x1b]", done.stdout)
    too_long = [line for line in done.stdout.splitlines() if len(line) > 80 and not any(p in line for p in paths)]
    assert not too_long


def test_a_run_its_end_and_an_evaluation_print_plain_lines_of_80_columns_and_no_warning(text_file, tmp_path):
    """As a module and as a script; data and tokens are prepared anew, as they are the first time."""
    out, paths = tmp_path / "run", (str(tmp_path), str(text_file))
    command = [*TINY, *SHORT, f"--train_file={text_file}", f"--output_dir={out}", "--resume_from_checkpoint=auto"]
    trained = run("-m", "train_loop.main", *command, HF_HOME=str(tmp_path / "cache"))
    assert_plain(trained, *paths)
    assert re.search(QUIET_NUMBERS, trained.stdout) and trained.stdout.count("\n") > 10
    again = run("train_loop/main.py", *command)
    assert_plain(again, *paths)
    assert again.stdout == f"the run in {out} is finished: 4 steps\n"
    evaluated = run(
        "train_loop/main.py", f"--model_name_or_path={out}", f"--validation_file={text_file}", "--block_size=32",
        "--eval_only", "--named_perplexities", NO_COLOR="1",
    )  # fmt: skip
    assert_plain(evaluated, *paths)
    assert re.search(r"^perplexity +[\d.]+$", evaluated.stdout, re.MULTILINE)


def test_two_processes_print_what_one_does_and_no_warning(text_file, tmp_path):
    config = ROOT / "launch_configs" / "multi_cpu.yaml"
    arguments = [*TINY, *SHORT, f"--train_file={text_file}", f"--output_dir={tmp_path}/run"]
    done = run("train_loop/main.py", *arguments, launcher=(*LAUNCH, "--config_file", config), NO_COLOR="1")
    assert_plain(done, str(tmp_path), str(text_file))
    assert len(re.findall(QUIET_NUMBERS, done.stdout)) == 1 and "world size 2" in done.stdout
