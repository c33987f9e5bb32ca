"""Recipes and paths: what is read, how much of it, and what ~ means; commands that are printed can be pasted."""

import dataclasses
import re
import shlex
import time

import pytest
from conftest import TINY

from train_loop.main import main
from train_loop.settings import Settings, read_settings

DATA = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o"]
PATHS = [f.name for f in dataclasses.fields(Settings) if f.metadata["is_path"]]


def problems_of(recipe):
    with pytest.raises(ValueError) as error:
        read_settings([*DATA, f"--config={recipe}"])
    return str(error.value).split("\n")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("where", ["recipe", "flag"])
def test_a_tilde_is_the_home_folder(name, where, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "r.yaml").write_text(f"{name}: ~/a.txt\n" if where == "recipe" else "seed: 1\n")
    given = {"output_dir": "o", name: "~/a.txt"}
    given.setdefault("model_name_or_path", "m") if name != "config_name" else None
    if name not in ("train_file", "validation_file"):
        given.setdefault("dataset_name", "d")
    else:
        given.setdefault("train_file", "~/a.txt")
    if where == "recipe":
        del given[name]
    settings = read_settings(["--config=~/r.yaml", *(f"--{key}={value}" for key, value in given.items())])
    assert getattr(settings, name) == f"{tmp_path}/a.txt"


def test_a_tilde_elsewhere_is_text():
    assert read_settings([*DATA, "--sample_prompt=~/x", "--text_column=~"]).sample_prompt == ["~/x"]


DEEP = 100_000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, said",
    [
        ("seed: " + "[" * DEEP + "]" * DEEP, "its lists are nested too deep"),
        ("seed: " + "{a: " * DEEP + "}" * DEEP, "its lists are nested too deep"),
        (BOMB, "line 2: aliases (*name) are not allowed"),
        ("a: &a\n  seed: 1\n<<: *a\n", "aliases (*name) are not allowed"),
        ("seed: 1\nblock_size: 8\nseed: 2\n", "line 1: a name is given twice"),
        ("# " + "x" * 2**20 + "\nseed: 1\n", "it is larger than 1,048,576 characters"),
    ],
    ids=["lists", "mappings", "bomb", "merge", "twice", "large"],
)
def test_a_recipe_that_means_more_than_a_recipe_can_is_refused_at_once(text, said, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    began = time.perf_counter()
    (problem,) = problems_of(recipe)
    assert said in problem and len(problem) < 400 + len(str(recipe))
    assert time.perf_counter() - began < 60, "seconds; it takes a fraction of one on an idle machine"


def test_a_value_that_is_long_is_cut_where_it_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text(f"seed: {'9x' * 100_000}\n")
    (problem,) = problems_of(tmp_path / "r.yaml")
    assert len(problem) < 250 + len(str(tmp_path)) and problem.endswith("..., but must be a whole number, at least 0")


def test_the_command_that_a_run_prints_can_be_pasted_into_a_shell(text_file, tmp_path, capsys):
    short = ["--max_train_steps=1", "--checkpointing_steps=none", f"--train_file={text_file}"]
    assert main([*TINY, *short, f"--output_dir={tmp_path}/my $HOME run; 'quoted'"]) == 0
    (command,) = re.findall(r"^  (python -m train_loop\.generate .*)$", capsys.readouterr().out, re.MULTILINE)
    assert shlex.split(command)[3:] == [f"{tmp_path}/my $HOME run; 'quoted'", "The value of"]


def test_the_fast_recipe_does_the_job_of_the_reference_recipe_with_a_third_of_its_tokens():
    reference, fast = (read_settings([f"--config=distilgpt2_wikitext2{name}"]) for name in ("", "_fast"))
    same_job = ("model_name_or_path", "dataset_name", "dataset_config_name", "block_size", "max_train_steps")
    assert all(getattr(reference, name) == getattr(fast, name) for name in same_job)
    assert 3 * fast.num_train_epochs == reference.num_train_epochs
    assert reference.output_dir != fast.output_dir
