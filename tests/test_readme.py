"""README's commands, run as they stand there, and what it says about the figures' commands."""

import json
import re
import shlex
import sys

import pytest
from conftest import ONLINE, PROGRAMS, ROOT, TOKEN, run
from hosts import documented_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if not kind]
COMMANDS = [
    shlex.split(line)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"accelerate|python|tensorboard|sbatch", line)
]
TRAIN = ["accelerate", "launch", "train_loop/main.py"]
SHORT = ["--max_train_steps=2", "--max_eval_samples=2", "--logging_steps=1"]


def test_every_command_works_one_after_the_other_as_it_stands(healthy, text_file, tmp_path):
    """In README's order, in one folder, with the files that it speaks of; two steps of each run."""
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for name in ("my.txt", "other.txt"):
        (tmp_path / name).write_text("".join(lines[:200]), encoding="utf-8")
    (tmp_path / "corpus").mkdir()
    for name in ("corpus/1.jsonl", "corpus/2.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    for name in ("train_loop", "launch_configs"):
        (tmp_path / name).symlink_to(ROOT / name)

    here, launched = [], []
    for words in COMMANDS:
        if words[:3] == TRAIN:
            here.append(("train_loop.main", words[3:] + SHORT))
        elif words[:4] == ["accelerate", "launch", "-m", "train_loop.main"]:
            here.append(("train_loop.main", words[4:] + SHORT))
        elif words[:2] == ["python", "-m"] and words[2].startswith("train_loop."):
            here.append((words[2], words[3:]))
        elif words[:3] == ["accelerate", "launch", "--config_file"] and "ADDRESS" not in words:
            launched.append([*words, *SHORT])
        elif words[0] == "tensorboard":
            launched.append(["tensorboard.main", *words[1:], "--inspect"])  # without it, it would stay
        else:
            assert words[:3] == ["python", "-m", "pip"] or words[0] == "sbatch" or "ADDRESS" in words, words
    assert len(here) >= 8 and len(launched) == 2

    environment = healthy.environment(tmp_path / "cache", TOKEN) | {"PYTHONPATH": str(ROOT)}
    in_folder = ("env", "-C", tmp_path, *ONLINE, sys.executable)
    done = run(PROGRAMS / "one_after_the_other.py", json.dumps(here), launcher=in_folder, **environment)
    statuses = re.findall(r"^exit status (.*?) ", done.stdout, re.MULTILINE)
    assert statuses == ["0"] * len(here), done.stdout + done.stderr
    assert "is finished" in done.stdout and f"pushed: {healthy.address}/me/" in done.stdout
    outputs = []
    for words in launched:
        module = "accelerate.commands.accelerate_cli" if words[0] == "accelerate" else words[0]
        done = run("-m", module, *words[1:], launcher=in_folder, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    assert "eval/loss" in outputs[0] and "processes 2" in outputs[1]


@pytest.mark.quick
def test_the_picture_of_the_house_names_every_file():
    house = next(block for block in BLOCKS if block.startswith("train_loop/\n"))
    files = sorted((ROOT / "train_loop").rglob("*.py"))
    missing = [path.name for path in files if path.stem != "__init__" and not re.search(rf"\b{path.stem}\b", house)]
    assert not missing, f"README's picture of the house (Change the loop) does not name {', '.join(missing)}"


def test_the_commands_for_several_machines_are_those_of_their_configs():
    """Which test_launch_configs.py runs."""
    (nodes,) = [words for words in COMMANDS if "ADDRESS" in words]
    assert nodes[:-1] == documented_command("multi_node.yaml")[: len(nodes) - 1]
    (slurm,) = [words for words in COMMANDS if words[0] == "sbatch"]
    assert f"#   {shlex.join(slurm)}\n" in (ROOT / "launch_configs" / "slurm.sbatch").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python\s(tests/benchmarks/[^`]*)`", README))))
def test_a_figures_command_is_there_and_takes_its_flags(command):
    path, *words = command.split()
    text = (ROOT / path).read_text(encoding="utf-8")
    flags = [word for word in words if word.startswith("--")]
    assert all(f'add_argument("{flag}"' in text for flag in flags), flags
