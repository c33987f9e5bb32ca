"""The pages: their commands are run as they stand there; their links lead somewhere; the tests, the benchmarks and the
files that they name are there."""

import itertools
import json
import re
import shlex
import sys

import pytest
import yaml
from conftest import ONLINE, PROGRAMS, ROOT, TOKEN, run
from hosts import documented_command
from transformers.trainer_utils import get_last_checkpoint

from train_loop import __version__
from train_loop.generate import generate

# in the order in which their commands are run: a page may use what an earlier one has trained
PAGES = ["README.md", "launch_configs/README.md", "train_loop/README.md"]
PAGES += [f"train_loop/{name}/README.md" for name in ("recipes", "data", "checkpoint", "report", "compare", "publish")]
PAGES += [f"train_loop/{name}/README.md" for name in ("settings", "trial", "machine", "process")]
PAGES += ["tests/README.md", "tests/benchmarks/README.md", "CONTRIBUTING.md"]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
ALL = "\n".join(TEXTS.values())
BLOCKS = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", ALL, re.MULTILINE | re.DOTALL) if not kind]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
# a command that stands on two pages is run once
COMMANDS = [
    shlex.split(line) for line in dict.fromkeys(LINES) if re.match(r"accelerate|python|tensorboard|sbatch", line)
]
TRAIN = ["accelerate", "launch", "train_loop/main.py"]
SHORT = ["--max_train_steps=2", "--max_eval_samples=2", "--logging_steps=1"]


def is_of_a_config(words):
    """Whether a command needs GPUs or several machines: test_launch_configs.py runs it as it stands in its config."""
    return "ADDRESS" in words or "launch_configs/multi_gpu.yaml" in words


def test_every_command_works_as_written_one_after_the_other(healthy, text_file, tmp_path):
    """In one folder, with the files that the pages speak of; two steps of each run."""
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for name in ("my.txt", "other.txt"):
        (tmp_path / name).write_text("".join(lines[:200]), encoding="utf-8")
    answers = [pair for pair in itertools.pairwise(lines[:400]) if pair[1].strip()]
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in answers]
    rows = {"questions.jsonl": [{"prompt": a, "completion": b} for a, b in answers]}
    rows["my.jsonl"] = [{"question": a, "answer": b} for a, b in answers]
    rows["chats.jsonl"] = [{"messages": messages} for messages in turns]
    for name, found in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
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
        elif words[:3] == ["accelerate", "launch", "--config_file"] and not is_of_a_config(words):
            launched.append([*words, *SHORT])
        elif words[0] == "tensorboard":
            launched.append(["tensorboard.main", *words[1:], "--inspect"])  # without it, it would stay
        else:
            is_for_tests = words[:3] in (["python", "-m", "pip"], ["python", "-m", "pytest"])
            assert is_for_tests or words[0] == "sbatch" or is_of_a_config(words), words
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
    assert "processes 2" in outputs[0] and "eval/loss" in outputs[1]


@pytest.mark.quick
def test_the_picture_of_the_house_names_every_file():
    house = next(block for block in BLOCKS if block.startswith("train_loop/\n"))
    files = sorted((ROOT / "train_loop").rglob("*.py"))
    missing = [path.name for path in files if path.stem != "__init__" and not re.search(rf"\b{path.stem}\b", house)]
    assert not missing, f"the picture of the files in train_loop/README.md does not name {', '.join(missing)}"


def test_the_commands_for_gpus_and_several_machines_are_those_of_their_configs():
    """Which test_launch_configs.py runs."""
    several = [words for words in COMMANDS if is_of_a_config(words)]
    assert len(several) == 2
    for words in several:
        documented = documented_command(words[3].removeprefix("launch_configs/"))
        assert words[: len(documented)] == documented
    (slurm,) = [words for words in COMMANDS if words[0] == "sbatch"]
    assert f"#   {shlex.join(slurm)}\n" in (ROOT / "launch_configs" / "slurm.sbatch").read_text(encoding="utf-8")


def test_the_flags_of_generate_are_those_of_its_help(capsys):
    with pytest.raises(SystemExit):
        generate(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    section = TEXTS["train_loop/README.md"].partition("## Generate text")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(--\w+)` \| (\S+) \| (.*) \|$", section, re.MULTILINE)
    assert {flag for flag, _, _ in rows} == {*re.findall(r"--\w+", told)} - {"--help"}
    for flag, default, what in rows:
        assert f"{what} (default: {default})" in told, flag


WITHOUT_SCRIPTS = re.sub(r"^```bash$.*?^```$", "", ALL, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python\s(tests/benchmarks/[^`]*)`", WITHOUT_SCRIPTS))))
def test_a_figures_command_is_there_and_takes_its_flags(command):
    path, *words = command.split()
    text = (ROOT / path).read_text(encoding="utf-8")
    flags = [word for word in words if word.startswith("--")]
    assert all(f'add_argument("{flag}"' in text for flag in flags), flags


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200 and (ROOT / "README.md").stat().st_size <= 12_000


def test_every_page_is_among_these_and_readme_leads_to_it():
    folders = [ROOT / name for name in ("train_loop", "launch_configs", "tests")]
    found = {str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("README.md")}
    assert found == {*PAGES} - {"README.md", "CONTRIBUTING.md"}
    assert all(f"]({page})" in TEXTS["README.md"] for page in PAGES[1:])


def anchors(page):
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), link


def test_tests_that_a_page_names_are_there():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"`(test_\w+)`", ALL)):
        assert f"def {name}(" in code, name
    for name in set(re.findall(r"`(?:tests/)?(test_\w+\.py)`", ALL)):
        assert (ROOT / "tests" / name).is_file(), name


def test_trainers_own_helper_takes_a_checkpoint_that_is_not_complete_as_readme_says(tmp_path):
    for name in ("checkpoint-5/model.safetensors", "checkpoint-5/trainer_state.json", "checkpoint-10/half"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_each_benchmark_is_in_the_list_with_its_last_figure():
    listed = TEXTS["tests/benchmarks/README.md"].partition("## All benchmarks")[2]
    for path in (ROOT / "tests" / "benchmarks").glob("*.py"):
        assert f"`{path.name}`" in listed, path.name


def test_changelog_and_citation_are_of_this_version():
    assert f"\n## {__version__} (" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
