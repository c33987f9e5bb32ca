"""Recipes and paths: what is read, how much of it, and what ~ means; commands that are printed can be pasted."""

import dataclasses
import importlib.util
import json
import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from train_loop.main import main
from train_loop.report import BlockNats, Kept, write_block_nats
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


def finished_run(folder, tokens, losses, of_blocks, first_step=0, blocks="the blocks"):
    """What `recipes.py table` reads of a run: `losses` of its evaluations, and the last one of each block."""
    folder.mkdir(parents=True)
    (folder / "all_results.json").write_text(json.dumps({"train_tokens": tokens}))
    lines = [{"step": first_step + 10 * index, "eval_loss": loss} for index, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    nats = BlockNats(np.float32(of_blocks), np.full(len(of_blocks), 2, np.int64), blocks)
    write_block_nats(folder, {"last": Kept(10, {"eval": nats})})


def recipes():
    """tests/benchmarks/recipes.py as a module."""
    path = Path(__file__).parent / "benchmarks" / "recipes.py"
    spec = importlib.util.spec_from_file_location("recipes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_recipe_is_compared_by_the_share_of_tokens_after_which_it_reaches_the_reference(tmp_path, capsys):
    finished_run(tmp_path / "small" / "distilgpt2_wikitext2-1", 6000, [3.5, 3.0], [6.1, 5.9], first_step=10)
    finished_run(tmp_path / "small" / "distilgpt2_wikitext2-2", 6000, [4.1, 3.6, 3.1], [6.3, 6.1])
    # a loss of 3.05, reached by one seed after 10 of 40 steps and by the other after 20, of a third of the tokens
    finished_run(tmp_path / "small" / "fast-1", 2000, [4.0, 3.0, 2.9, 2.8, 2.7], [5.5, 5.3])
    finished_run(tmp_path / "small" / "fast-2", 2000, [4.0, 3.1, 2.9, 2.8, 2.7], [5.5, 5.3])
    recipes().table([tmp_path / "small"])
    reference, fast = capsys.readouterr().out.splitlines()[2:]
    assert reference == "| small | distilgpt2_wikitext2 | 2 | 6,000 | 4.1000 | 3.0500 |  | 1 |  |"
    # the seeds of the reference alone vary: t of 1 degree of freedom, 12.706, times sqrt(0.005 / 2)
    assert fast == "| small | fast | 2 | 2,000 | 4.0000 | 2.7000 | -0.3500 +- 0.6353 | 0.33 | 0.17 |"


def test_recipes_that_were_evaluated_on_different_blocks_are_not_compared(tmp_path):
    finished_run(tmp_path / "small" / "distilgpt2_wikitext2-1", 6000, [4.0, 3.0], [6.1, 5.9])
    finished_run(tmp_path / "small" / "fast-1", 2000, [4.0, 2.7], [5.5, 5.3], blocks="others")
    with pytest.raises(SystemExit, match="different blocks"):
        recipes().table([tmp_path / "small"])
