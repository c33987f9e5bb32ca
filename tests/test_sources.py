"""Several sources of training rows: the settings that name them, and runs on them."""

import json
import re

import pytest
import yaml
from conftest import (
    NO_DROPOUT,
    PROGRAMS,
    ROOT,
    TINY,
    assert_lines_agree,
    assert_same_run,
    copy_until,
    lines_of,
    without_timings,
)
from forks import forked

from train_loop.data import sources
from train_loop.data.inputs import load_sources
from train_loop.errors import UserError
from train_loop.main import main
from train_loop.settings import sources_of, validation_sets_of, weights_of
from train_loop.settings.command_line import read_settings
from train_loop.settings.sources import OF_TRAINING

MODEL = ["--model_name_or_path=m", "--output_dir=o"]


# a run


@pytest.fixture(scope="module")
def arguments(two_texts):
    """A mixed run of two epochs."""
    recipe = {
        "train_file": [
            {"train_file": f"{two_texts}/long.txt", "weight": 7},
            {"name": "brief", "train_file": f"{two_texts}/short.txt", "weight": 3},
        ]
    }
    (two_texts / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tiny = [word for word in TINY if not re.match("--(max_train_samples|tokenizer_vocab_size)", word)]
    arguments = [
        f"--config={two_texts}/recipe.yaml",
        *tiny,
        f"--tokenizer_name={two_texts}/tokenizer",
        "--max_eval_samples=9",
    ]
    return [*arguments, "--num_train_epochs=2", "--checkpointing_steps=8", "--checkpoints_total_limit=9"]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main([*arguments, f"--output_dir={folder}"]) == 0
    return folder


def test_the_banner_says_what_each_source_gives(arguments, tmp_path, capsys):
    assert main([*arguments, "--max_train_steps=1", f"--output_dir={tmp_path}/run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = re.findall(
        r"(long|brief): [\d,]+ rows -> .*?an epoch takes (\d+) blocks = ([\d,]+) tokens, ([\d.]+)%", printed
    )
    (a, num_a, tokens_a, share_a), (b, num_b, _, share_b) = found
    assert (a, b) == ("long", "brief") and int(num_a) == round(int(num_b) * 7 / 3)
    assert int(tokens_a.replace(",", "")) == 32 * int(num_a)
    assert abs(float(share_a) - 70) < 1 and float(share_a) + float(share_b) == pytest.approx(100)
    # without a validation file each source has rows held out, and their loss
    assert "long: the last" in printed and "brief: the last" in printed
    assert "validation long: " in printed and "eval_brief_loss" in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("step", [8, 16])
def test_a_mixed_run_that_is_resumed_ends_as_if_left_alone(step, arguments, trained, tmp_path):
    """In the middle of the first epoch, and of the second."""
    copy_until(step, trained, tmp_path / "run")
    assert main([*arguments, f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=auto"]) == 0
    assert_same_run(tmp_path / "run", trained)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda items: items[0].update(weight=6), "weights of the sources: [0.7, 0.3] -> [0.666667, 0.333333]"),
        (lambda items: [item.pop("weight") for item in items], "weights of the sources: [0.7, 0.3] -> None"),
        (lambda items: items[0].update(max_train_samples=300), "training blocks: "),
        (lambda items: items.reverse(), "training blocks: "),
        (lambda items: items.pop(), "training blocks: "),
    ],
)
def test_another_mixture_is_refused(change, said, two_texts, arguments, trained, tmp_path, capsys):
    recipe = yaml.safe_load((two_texts / "recipe.yaml").read_text())
    change(recipe["train_file"])
    if len(recipe["train_file"]) == 1:
        del recipe["train_file"][0]["weight"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [f"--config={tmp_path}/recipe.yaml", *arguments[1:], f"--output_dir={trained}"]
    copy_until(8, trained, tmp_path / "run")
    assert main([*words[:-1], f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=auto"]) == 1
    error = capsys.readouterr().err
    assert "belongs to a different run" in error and said in error


def test_settings_with_sources_are_read_back_the_same(trained, arguments):
    written = read_settings([f"--config={trained}/train_config.yaml"])
    assert written == read_settings([*arguments, f"--output_dir={trained}"])
    assert weights_of(written) == {"long": 0.7, "brief": 0.3}
    card = (trained / "README.md").read_text()
    assert "on long.txt (70.0% of the blocks) and short.txt (30.0% of the blocks)." in card


@pytest.mark.parametrize("how", [pytest.param("prepared", marks=pytest.mark.slow), "streamed"])
def test_two_processes_train_on_the_mixture_of_one(how, arguments, two_texts, tmp_path):
    """Without dropout, equal to rounding; the second epoch is in it. Resumed by two, bit for bit."""
    arguments = [*arguments, NO_DROPOUT, "--per_device_train_batch_size=4"]
    if how == "streamed":
        arguments += ["--streaming", "--shuffle_buffer_size=20", "--max_train_steps=22", "--eval_steps=11"]
        arguments += [f"--validation_file={two_texts}/valid.txt"]
    one = forked(
        PROGRAMS / "small_chunks.py", *arguments, "--gradient_accumulation_steps=2", f"--output_dir={tmp_path}/one"
    )
    two = forked(PROGRAMS / "small_chunks.py", *arguments, f"--output_dir={tmp_path}/two", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert max(line["epoch"] for line in without_timings(tmp_path / "one")) > 1
    assert_lines_agree(without_timings(tmp_path / "two"), without_timings(tmp_path / "one"))
    copy_until(8, tmp_path / "two", tmp_path / "resumed")
    more = [f"--output_dir={tmp_path}/resumed", "--resume_from_checkpoint=auto"]
    done = forked(PROGRAMS / "small_chunks.py", *arguments, *more, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "resumed", tmp_path / "two")


def test_a_streamed_mixture_that_is_resumed_ends_as_if_left_alone(arguments, two_texts, tmp_path, monkeypatch):
    """Resumed in the first epoch, at its end, and in the second, where the long stream continues."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 400)
    words = [word for word in arguments if not word.startswith("--checkpointing_steps")]
    words += ["--streaming", "--shuffle_buffer_size=20", "--max_train_steps=27", "--checkpointing_steps=9"]
    words += [f"--validation_file={two_texts}/valid.txt"]
    assert main([*words, f"--output_dir={tmp_path}/alone"]) == 0
    assert [line["step"] for line in lines_of(tmp_path / "alone") if "eval_loss" in line] == [0, 18, 27]
    state = json.loads((tmp_path / "alone" / "checkpoints" / "step-000027" / "state.json").read_text())
    long, short = state["position"]["stream"]["sources"]
    assert (long["round"], short["round"]) == (0, 1)
    for step in (9, 18):
        copy_until(step, tmp_path / "alone", tmp_path / f"from-{step}")
        assert main([*words, f"--output_dir={tmp_path}/from-{step}", "--resume_from_checkpoint=auto"]) == 0
        assert_same_run(tmp_path / f"from-{step}", tmp_path / "alone")


# settings


def read_recipe(entries, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(entries))
    return read_settings([f"--config={tmp_path}/recipe.yaml", *MODEL])


def test_the_command_line_takes_several_files_and_names(two_texts, monkeypatch):
    monkeypatch.chdir(two_texts)
    settings = read_settings([*MODEL, "--train_file", "long.txt", "other=short.txt"])
    assert {name: one.train_file for name, one in sources_of(settings).items()} == {
        "long": "long.txt",
        "other": "short.txt",
    }
    assert weights_of(settings) is None
    assert read_settings([*MODEL, "--train_file", "long.txt", "--train_file", "short.txt"]).train_file == "short.txt"


def test_a_source_has_the_runs_settings_but_for_its_own(two_texts, tmp_path):
    items = [
        {"name": "a", "train_file": f"{two_texts}/long.txt", "text_column": "body", "weight": 1},
        {"dataset_name": "some/data", "dataset_config_name": "c", "max_train_samples": 5, "weight": 3},
    ]
    found = sources_of(read_recipe({"train_file": items, "text_column": "text", "max_train_samples": 9}, tmp_path))
    a, b = found["a"], found["data"]
    assert (a.train_file, a.dataset_name, a.text_column, a.max_train_samples) == (
        f"{two_texts}/long.txt",
        None,
        ["body"],
        9,
    )
    assert (b.train_file, b.dataset_name, b.dataset_config_name) == (None, "some/data", "c")
    assert (b.text_column, b.max_train_samples) == (["text"], 5)


@pytest.mark.parametrize(
    "items, said",
    [
        (
            [{"train_file": "{}/long.txt", "wieght": 1}],
            "train_file, item 1: wieght is no key of it; there are name, train",
        ),
        (
            [{"train_file": "{}/long.txt", "weight": 0}, "{}/short.txt"],
            "item 1: weight is 0, but must be a number, above 0",
        ),
        (
            [{"train_file": "{}/long.txt", "weight": 1}, "{}/short.txt"],
            "1 of 2 items have a weight: give one to each, or",
        ),
        ([{"train_file": "{}/long.txt", "weight": 1}], "the weight of a single source has no effect"),
        ([{"train_file": "{}/long.txt", "dataset_name": "d"}], "item 1: needs train_file or dataset_name, one of them"),
        ([{"weight": 1}], "item 1: needs train_file or dataset_name, one of them"),
        (
            [{"train_file": "{}/long.txt", "dataset_config_name": "c"}],
            "item 1: dataset_config_name needs dataset_name",
        ),
        (["{}/long.txt", "{}/long.txt"], "long is the name of two items"),
        (["{}/long.txt", "{}/none.txt"], "none.txt: no such file"),
        (
            ["{}/long.txt", {"train_file": "{}/short.txt", "max_train_samples": "few"}],
            "item 2: max_train_samples is 'few'",
        ),
    ],
)
def test_a_source_that_cannot_be_is_one_sentence(items, said, two_texts, tmp_path):
    filled = json.loads(json.dumps(items).replace("{}", str(two_texts)))
    with pytest.raises(UserError) as error:
        read_recipe({"train_file": filled}, tmp_path)
    (problem,) = str(error.value).split("\n")
    assert said in problem


def test_streams_without_weights_are_refused(two_texts):
    words = [*MODEL, "--streaming", "--max_train_steps=3", f"--validation_file={two_texts}/valid.txt"]
    with pytest.raises(UserError, match="streaming several sources needs a weight for each, in a recipe"):
        read_settings([*words, "--train_file", f"{two_texts}/long.txt", f"{two_texts}/short.txt"])


def test_files_and_data_sets_stand_in_one_list_and_each_has_rows_held_out(two_texts, tmp_path):
    items = [f"{two_texts}/long.txt", {"dataset_name": "python_docs"}]
    train, validation, note = load_sources(read_recipe({"train_file": items}, tmp_path))
    assert {name: len(rows) for name, rows in train.items()} == {"long": 1140, "python_docs": 76}
    assert {name: len(rows) for name, rows in validation.items()} == {"long": 60, "python_docs": 3}
    assert note.startswith("long: the last 60 of 1,200 training rows") and "python_docs: the last 3 of 79" in note


def test_a_data_set_may_have_a_validation_file(two_texts):
    settings = read_settings([*MODEL, "--dataset_name=python_docs", f"--validation_file={two_texts}/valid.txt"])
    train, validation, note = load_sources(settings)
    assert len(train["training"]) == 79 and len(validation["validation"]) == 40 and note == ""


def test_the_recipe_on_the_page_is_valid(two_texts, tmp_path, monkeypatch):
    page = (ROOT / "train_loop" / "data" / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name in ("my.txt", "other.txt", "valid.jsonl", "recipe.yaml"):
        (tmp_path / name).write_text(recipe)
    monkeypatch.chdir(tmp_path)
    settings = read_settings(["--config=recipe.yaml"])
    assert weights_of(settings) == {"my": 0.7, "wiki": 0.3}
    assert list(sources_of(settings)) == ["my", "wiki"] and list(validation_sets_of(settings)) == ["mine", "log"]
    said = re.search(r"all the keys of a source: (.*?)\. What", page, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", said)) == {"name", "weight", *OF_TRAINING}
