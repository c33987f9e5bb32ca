"""Several validation sets with names: how they are given, and where their numbers are found."""

import json
import re

import matplotlib.image
import pytest
import yaml
from conftest import TINY, copy_until, lines_of, shows, without_timings
from huggingface_hub import ModelCard

from train_loop.main import main
from train_loop.report.curve import draw_run
from train_loop.settings import Settings, sources_of, validation_sets_of
from train_loop.settings.command_line import read_settings

MODEL = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o"]


@pytest.fixture(scope="module")
def files(text_file, tmp_path_factory):
    """A folder with prose.txt, wiki.txt, and mine.jsonl, whose text is in the column body, not in note."""
    folder = tmp_path_factory.mktemp("files")
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "prose.txt").write_text("".join(lines[200:]), encoding="utf-8")
    (folder / "wiki.txt").write_text("".join(lines[:100]), encoding="utf-8")
    rows = [json.dumps({"note": "no text", "body": line}) for line in lines[100:200]]
    (folder / "mine.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.chdir(files)


@pytest.fixture(scope="module")
def arguments(files):
    """Two sets, of at most 10 and 8 blocks."""
    recipe = {
        "validation_file": [
            f"wiki={files}/wiki.txt",
            {"validation_file": f"{files}/mine.jsonl", "text_column": "body", "max_eval_samples": 8},
        ]
    }
    (files / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [f"--config={files}/recipe.yaml", *TINY, f"--train_file={files}/prose.txt", "--num_train_epochs=2"]
    return [*arguments, "--max_eval_samples=10", "--checkpointing_steps=10", "--load_best_model_at_end"]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main([*arguments, f"--output_dir={folder}"]) == 0
    return folder


def places(settings):
    return {name: one.validation_file for name, one in validation_sets_of(settings).items()}


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["wiki.txt"], {"validation": "wiki.txt"}),
        (["wiki.txt", "mine.jsonl"], {"wiki": "wiki.txt", "mine": "mine.jsonl"}),
        (["test=wiki.txt", "mine.jsonl"], {"test": "wiki.txt", "mine": "mine.jsonl"}),
        (["test=wiki.txt"], {"test": "wiki.txt"}),
    ],
)
def test_a_set_is_called_as_it_is_named_or_as_its_file(words, wanted, here):
    assert places(read_settings([*MODEL, "--validation_file", *words])) == wanted


def test_a_recipe_names_sets_in_a_list_or_in_a_mapping(here, tmp_path):
    for value in (["a=wiki.txt", {"name": "b", "validation_file": "mine.jsonl"}], {"a": "wiki.txt", "b": "mine.jsonl"}):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"validation_file": value}))
        settings = read_settings([f"--config={tmp_path}/recipe.yaml", *MODEL])
        assert places(settings) == {"a": "wiki.txt", "b": "mine.jsonl"}


def test_a_file_that_is_really_called_so_is_no_name_and_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    assert places(read_settings([*MODEL, "--validation_file", "a=b.txt"])) == {"validation": "a=b.txt"}
    assert places(read_settings([*MODEL, "--validation_file", "c=a=b.txt"])) == {"c": "a=b.txt"}


@pytest.mark.parametrize(
    "words, said",
    [
        (["a=wiki.txt", "a=mine.jsonl"], "--validation_file: a is the name of two items"),
        (["wiki.txt", "wiki.txt"], "--validation_file: wiki is the name of two items"),
        (["wiki.txt", "*.jsonl"], "--validation_file, item 2: '*' is no name"),
        (["wiki.txt", "text=mine.jsonl"], "item 2: the name text has another meaning in metrics.jsonl"),
        (["wiki.txt", "my_text=mine.jsonl"], "the name my_text has another meaning"),
        (["wiki.txt", "b=none.txt"], "validation_file none.txt: no such file"),
    ],
)
def test_a_name_that_cannot_be_is_one_sentence(words, said, here):
    with pytest.raises(ValueError) as error:
        read_settings([*MODEL, "--validation_file", *words])
    (problem,) = str(error.value).split("\n")
    assert said in problem


@pytest.mark.parametrize(
    "value, said",
    [
        ([{"validation_file": "wiki.txt", "weight": 1}], "item 1: weight is no key of it; there are name, validation_"),
        ([{"name": "wiki"}], "validation_file, item 1: needs validation_file"),
        ({"a": {"validation_file": "wiki.txt", "max_eval_samples": 0}}, "item 1: max_eval_samples is 0, but must be a"),
        ([], "validation_file is an empty list"),
        ([["wiki.txt"]], "validation_file is ['wiki.txt'], but must be text"),
    ],
)
def test_an_item_of_a_recipe_that_cannot_be_is_one_sentence(value, said, here, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"validation_file": value}))
    with pytest.raises(ValueError) as error:
        read_settings([f"--config={tmp_path}/recipe.yaml", *MODEL])
    (problem,) = str(error.value).split("\n")
    assert problem.startswith(f"recipe {tmp_path}/recipe.yaml: validation_file") and said in problem


def test_a_key_of_one_set_does_not_change_the_run_or_other_sets():
    settings = Settings(text_column="text", validation_file=[{"name": "a", "validation_file": "a", "text_column": "b"}])
    assert validation_sets_of(settings)["a"].text_column == "b" and settings.text_column == "text"
    assert sources_of(settings) == {}


def test_each_set_has_its_loss_in_every_record(trained):
    evaluations = [line for line in lines_of(trained) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 13, 26]
    for line in [*evaluations, json.loads((trained / "all_results.json").read_text())]:
        assert {"eval_loss", "perplexity", "eval_tokens"} <= line.keys()
        assert {"eval_mine_loss", "eval_mine_perplexity", "eval_mine_tokens"} <= line.keys()
        assert line["eval_loss"] != line["eval_mine_loss"] and line["eval_mine_tokens"] == 8 * 31
    card = (trained / "README.md").read_text()
    assert "| step | epoch | training loss | wiki: loss | wiki: perplexity | mine: loss | mine: perplexity |" in card
    last = evaluations[-1]
    assert f"| {last['eval_loss']:.4f} | {last['perplexity']:.2f} | {last['eval_mine_loss']:.4f} |" in card
    assert "Validation on wiki (at most 10 blocks (max_eval_samples)) after 26 optimizer steps: loss" in card
    assert f"On mine: loss {last['eval_mine_loss']:.4f}, perplexity {last['eval_mine_perplexity']:.2f}" in card
    results = {
        (r.dataset_name, r.metric_type): r.metric_value for r in ModelCard.load(trained / "README.md").data.eval_results
    }
    assert results["mine", "loss"] == pytest.approx(last["eval_mine_loss"], abs=1e-6)
    assert results["wiki", "perplexity"] == pytest.approx(last["perplexity"], abs=1e-6)


def test_the_console_has_a_row_for_each_set_and_says_which_decides(arguments, tmp_path, capsys):
    assert main([*arguments, "--max_train_steps=1", f"--output_dir={tmp_path}/run"]) == 0
    printed = capsys.readouterr().out
    first = next(line for line in lines_of(tmp_path / "run") if "eval_loss" in line)
    rows = [line.split() for line in printed.splitlines()]
    assert ["0", "0.00", f"{first['eval_loss']:.4f}", f"{first['perplexity']:.2f}", "wiki"] in rows
    assert ["0", "0.00", f"{first['eval_mine_loss']:.4f}", f"{first['eval_mine_perplexity']:.2f}", "mine"] in rows
    assert re.search(r"^validation  wiki: \d+ rows", printed, re.M) and re.search(
        r"^ {12}mine: 100 rows", printed, re.M
    )
    assert "best        wiki, the first set, decides about the best model and early stopping" in printed


def test_settings_with_named_sets_are_read_back_the_same(trained):
    settings = read_settings([f"--config={trained}/train_config.yaml"])
    assert (
        read_settings([f"--config={trained}/train_config.yaml", "--output_dir=x"]).validation_file
        == settings.validation_file
    )
    assert places(settings).keys() == {"wiki", "mine"} and validation_sets_of(settings)["mine"].text_column == ["body"]


def test_a_run_with_named_sets_resumes_bit_for_bit(arguments, trained, tmp_path):
    copy_until(20, trained, tmp_path / "resumed")
    assert main([*arguments, f"--output_dir={tmp_path}/resumed", "--resume_from_checkpoint=auto"]) == 0
    assert without_timings(tmp_path / "resumed") == without_timings(trained)


def test_a_model_alone_is_evaluated_on_each_set(trained, here, tmp_path, capsys):
    arguments = [f"--model_name_or_path={trained}", "--block_size=32", "--max_eval_samples=10", "--eval_only"]
    arguments += ["--validation_file", "wiki=wiki.txt", "again=wiki.txt", f"--output_dir={tmp_path}/out"]
    assert main(arguments) == 0
    results, last = json.loads((tmp_path / "out" / "all_results.json").read_text()), lines_of(trained)[-1]
    assert results["eval_loss"] == results["eval_again_loss"] == last["eval_loss"]
    assert re.search(r"^eval_again_perplexity +[\d.]+$", capsys.readouterr().out, re.M)


def test_the_curve_has_a_line_for_each_set(tmp_path):
    lines = [{"step": s, "epoch": 1, "eval_loss": 2.0 + s, "eval_mine_loss": 5.0 - s} for s in range(5)]
    draw_run(lines, tmp_path / "two.png", ["wiki", "mine"])
    draw_run(lines, tmp_path / "one.png")
    two, one = (matplotlib.image.imread(tmp_path / name) for name in ("two.png", "one.png"))
    assert (
        shows(two, "tab:orange")
        and shows(two, "tab:green")
        and shows(one, "tab:orange")
        and not shows(one, "tab:green")
    )
