"""Settings: where they come from, and what is said when they are wrong."""

import dataclasses
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import yaml
from conftest import run

from train_loop.files import data_files, file_kind
from train_loop.settings.command_line import RECIPES, read_settings
from train_loop.settings.settings import Settings

MODEL = ["--model_name_or_path", "some/model"]
DATA = ["--dataset_name", "some/data", "--output_dir", "out"]


def problems_of(argv):
    with pytest.raises(ValueError) as error:
        read_settings(argv)
    return str(error.value).split("\n")


def test_flags_win_over_the_recipe_and_the_recipe_over_the_default(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model_name_or_path: m\ndataset_name: d\noutput_dir: o\nlearning_rate: 2e-5\nblock_size: 64\n")
    settings = read_settings(["--config", str(recipe), "--block_size", "32"])
    assert (settings.block_size, settings.learning_rate, settings.seed) == (32, 2e-5, 42)


@pytest.mark.parametrize("words", [["--block-size", "64"], ["--block_size=64"], ["--block-size=64"]])
def test_a_flag_may_be_spelled_with_hyphens_and_an_equals_sign(words):
    assert read_settings([*MODEL, *DATA, *words]).block_size == 64


def test_a_value_keeps_its_hyphens():
    assert read_settings([*MODEL, *DATA, "--text_column=my-own--text"]).text_column == ["my-own--text"]


def test_without_a_model_or_data_the_recipe_is_quickstart():
    assert read_settings(["--seed", "7"]).output_dir == "runs/quickstart"
    assert read_settings([*MODEL, *DATA]).tokenizer_vocab_size is None


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_valid(recipe, tmp_path):
    # the one for a text of one's own leaves it to the command line which
    (tmp_path / "a.txt").write_text("text")
    files = ["--train_file", str(tmp_path)] if recipe == "own_text" else []
    assert read_settings(["--config", recipe, *files]).output_dir.startswith("runs/")


def test_resolved_settings_written_as_yaml_are_read_back_the_same(tmp_path):
    settings = read_settings([*MODEL, *DATA, "--adam_epsilon", "1e-9", "--eval_steps", "5"])
    path = tmp_path / "train_config.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(settings)))
    assert read_settings(["--config", str(path)]) == settings


def test_print_config_prints_settings_that_are_read_back_the_same_and_runs_nothing(tmp_path):
    arguments = ["--config=quickstart", "--learning_rate=1e-4", f"--output_dir={tmp_path}/out"]
    done = run("-m", "train_loop.main", *arguments, "--print-config")
    assert done.returncode == 0 and done.stderr == "" and not (tmp_path / "out").exists()
    (tmp_path / "mine.yaml").write_text(done.stdout)
    assert read_settings(["--config", str(tmp_path / "mine.yaml")]) == read_settings(arguments)
    assert problems_of([*arguments, "--print_config", "--seed=x"]) == [
        "the command line: --seed is 'x', but must be a whole number, at least 0"
    ]


def test_a_folder_means_its_text_files_and_a_pattern_all_files_that_fit_it(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt.gz", "sub/x.jsonl", "d.csv", "e.pdf", ".hidden.txt", "sub/.e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    names = lambda path: [str(file.relative_to(tmp_path)) for file in data_files(path).paths]  # noqa: E731
    assert names(tmp_path) == ["a.md", "b.txt", "sub/c.txt.gz"] and data_files(tmp_path).num_left_out == 3
    assert names(tmp_path / "*.txt") == ["b.txt"] and names(tmp_path / "**" / "*.txt*") == ["b.txt", "sub/c.txt.gz"]
    assert names(tmp_path / "**" / "*.jsonl") == ["sub/x.jsonl"] and data_files(tmp_path / "*").num_left_out == 1
    assert data_files(tmp_path / "*.txt").each_is_a_row and not data_files(tmp_path / "b.txt").each_is_a_row
    assert names(tmp_path / "no.txt") == ["no.txt"] and names(tmp_path / "*.pdf") == []


def test_a_folder_that_is_linked_into_itself_gives_each_file_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("text")
    (tmp_path / "sub" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert data_files(tmp_path).paths == [tmp_path / "sub" / "a.txt"]


def test_a_switch_is_on_alone_or_with_a_value():
    data = [*MODEL, "--dataset_name", "d"]
    assert read_settings([*data, "--eval_only"]).eval_only
    assert read_settings([*data, "--eval_only", "true"]).eval_only
    assert not read_settings([*data, "--eval_only", "false", "--output_dir", "o"]).eval_only


def test_all_problems_are_reported_at_once_with_key_value_and_what_is_allowed(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rte: 1\nseed: [1]\n")
    problems = problems_of(["--config", str(recipe), "--block_size", "x", "--num_train_epochs", "0", "--no_such", "3"])
    assert problems == [
        f"recipe {recipe}: learning_rte is not a setting; did you mean learning_rate?",
        f"recipe {recipe}: seed is [1], but must be a whole number, at least 0",
        "the command line: --block_size is 'x', but must be a whole number, at least 2",
        "the command line: --num_train_epochs is '0', but must be a number, above 0",
        "the command line: --no_such is not a setting",
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--block_size", "1"], "--block_size"),
        (["--block_size", "12.5"], "--block_size"),
        (["--block_size", "inf"], "--block_size"),
        (["--block_size"], "--block_size"),
        (["--seed", "-1"], "--seed"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--learning_rate", "-0.1"], "--learning_rate"),
        (["--learning_rate", "true"], "--learning_rate"),
        (["--adam_beta1", "1"], "--adam_beta1"),
        (["--adam_epsilon", "0"], "--adam_epsilon"),
        (["--weight_decay", "-1"], "--weight_decay"),
        (["--max_grad_norm", "-1"], "--max_grad_norm"),
        (["--num_train_epochs", "-3"], "--num_train_epochs"),
        (["--max_train_steps", "0"], "--max_train_steps"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps"),
        (["--lr_scheduler_type", "stepwise"], "linear, cosine"),
        (["--num_warmup_steps", "-1"], "--num_warmup_steps"),
        (["--logging_steps", "0"], "--logging_steps"),
        (["--eval_steps", "0"], "--eval_steps"),
        (["--num_threads", "0"], "--num_threads"),
        (["--validation_split_percentage", "100"], "from 1 to 99"),
        (["--eval_only", "perhaps"], "true or false"),
        (["--text_column", ""], "--text_column needs a value: text"),
        (["--train_file"], "--train_file needs a value: text"),
        (["stray"], "'stray'"),
        (["--config"], "--config"),
        (["--config", "no_such_recipe"], "distilgpt2_wikitext2"),
        (["--config_name", "c"], "exactly one of"),
        (["--config_overrides", "n_layer=1"], "config_overrides"),
        (["--tokenizer_vocab_size", "500"], "tokenizer_vocab_size"),
        (["--train_file", "t.txt"], "not both"),
        (["--output_dir", ""], "--output_dir"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(words, said):
    (problem,) = [line for line in problems_of([*MODEL, *DATA, *words]) if said in line]
    assert len(problem) < 250


@pytest.mark.parametrize(
    "argv, said",
    [
        (MODEL, "no training data"),
        ([*MODEL, "--dataset_name", "d"], "output_dir is needed"),
        (["--model_type", "gpt2", *DATA], "model_type needs"),
        (["--config_name", "c", "--eval_only", *DATA], "eval_only needs model_name_or_path"),
        ([*MODEL, "--eval_only"], "eval_only needs data"),
        ([*MODEL, "--train_file", "no/such.txt", "--output_dir", "o"], "no/such.txt: no such file"),
        ([*MODEL, "--train_file", "no/*.txt", "--output_dir", "o"], "no/*.txt: there is no text file in it"),
        (["--gguf_file", "m.gguf", "--config_name", "c", *DATA], "gguf_file needs model_name_or_path"),
        (["--model_name_or_path", "some/m.gguf", *DATA], "give its folder, and its name as gguf_file"),
        (["--model_name_or_path", ".", "--gguf_file", "m.gguf", *DATA], "gguf_file m.gguf: no such file in ."),
        ([*MODEL, "--train_file", __file__, "--output_dir", "o"], "kind of file is unknown"),
        (["--config_name", "c", "--tokenizer_name", "t", "--tokenizer_vocab_size", "300", *DATA], "not both"),
        (["--model_type", "gpt2", "--model_revision", "r", *DATA], "model_revision needs"),
        ([*MODEL, *DATA, "--train_file", "x.txt"], "give dataset_name or train_file, not both"),
        ([*MODEL, *DATA, "--dry_run", "--eval_only"], "give dry_run or eval_only, not both"),
        ([*MODEL, *DATA, "--lora_r", "4", "--optimizer", "muon"], "give lora_r or optimizer muon, not both"),
        ([*MODEL, *DATA, "--eval_stride", "65", "--block_size", "64"], "eval_stride is 65, more than block_size 64"),
        ([*MODEL, *DATA, "--dataset_name", "python_docs", "--streaming"], "cannot read python_docs"),
        ([*MODEL, "--train_file", __file__, "--streaming", "--eval_only"], "streaming needs validation_file"),
        (
            [*MODEL, *DATA, "--sample_prompt", "p", "--eval_only"],
            "sample_prompt is for training: it has no effect with",
        ),
        ([*MODEL, "--dataset_config_name", "c", "--train_file", "x.txt", "--output_dir", "o"], "dataset_config_name"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(argv, said):
    assert any(said in line for line in problems_of(argv))


@pytest.mark.parametrize("text", ["just words", "- a\n- list", "a: [", "\x00"])
def test_a_recipe_that_is_no_mapping_is_refused(text, tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    (problem,) = problems_of(["--config", str(recipe)])
    assert "cannot be read" in problem


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a.txt", "text"),
        ("a.JSONL.gz", "json"),
        ("a.csv", "csv"),
        ("a.parquet", "parquet"),
        ("a.gz", None),
        ("a", None),
    ],
)
def test_the_kind_of_a_file_is_told_by_its_ending(name, kind):
    assert file_kind(name) == kind


def test_help_is_in_groups_names_units_and_defaults_and_answers_before_torch_is_loaded():
    done = run("-X", "importtime", "train_loop/main.py", "--help", COLUMNS="80")
    assert done.returncode == 0 and re.search(r"\| +train_loop$", done.stderr, re.M), "the imports are not listed"
    assert not re.search(r"\| +(torch|transformers|accelerate|datasets)$", done.stderr, re.M)
    for group in ("model:", "data:", "training:", "evaluation:", "output:"):
        assert f"\n{group}\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "(default: 128)" in " ".join(done.stdout.split())
    for f in dataclasses.fields(Settings):
        assert f"--{f.name} " in done.stdout


NAMES = [f.name for f in dataclasses.fields(Settings)]
VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20),
    st.sampled_from(
        ["", "true", "none", "null", "epoch", "1e400", "-0", "0x10", "1_000", "auto", "[1]", "{}", "~", "."]
    ),
)


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
@hypothesis.example([("mirror", "\0")])
@hypothesis.given(st.lists(st.tuples(st.sampled_from(NAMES), VALUES), min_size=1, max_size=5))
def test_any_value_of_any_setting_is_accepted_or_named_in_an_error(pairs):
    """Any command line gives settings within their ranges, or a ValueError that names a flag."""
    argv = [*MODEL, *DATA, *(f"--{name}={value}" for name, value in pairs)]
    try:
        settings = read_settings(argv)
    except ValueError as error:
        assert all(any(name in line for name in NAMES) for line in str(error).split("\n"))
    else:
        for f in dataclasses.fields(Settings):
            value = getattr(settings, f.name)
            assert value is None or not f.metadata["check"] or f.metadata["check"](value)


YAML = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()), st.dates())
KEYS = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))  # a problem is a line


@hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(entries=st.dictionaries(st.one_of(st.sampled_from(NAMES), KEYS, st.integers()), YAML, max_size=4))
def test_any_recipe_is_accepted_or_its_keys_are_named_in_an_error(tmp_path, entries):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(entries), encoding="utf-8")
    try:
        read_settings(["--config", str(recipe), *MODEL, *DATA])
    except ValueError as error:
        named = (*map(str, entries), *NAMES)
        assert all(any(name in line for name in named) for line in str(error).split("\n"))
