"""The arguments of transformers' scripts: each is a setting, an alias, without effect, or answered in a sentence."""

import dataclasses
import shlex
import types
import typing
import warnings

import pytest
import yaml
from conftest import ROOT, lines_of, run
from transformers import TrainingArguments

from train_loop.main import main
from train_loop.settings import Settings, as_recipe, read_settings
from train_loop.settings.habits import ALIASES, NO_EFFECT, REFUSED, SAME
from train_loop.settings.page import page

DATA = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o"]
FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
# of run_clm.py and run_clm_no_trainer.py, beside those of TrainingArguments; older names among them
SCRIPTS = (
    "model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir use_fast_tokenizer "
    "model_revision token use_auth_token trust_remote_code dtype torch_dtype low_cpu_mem_usage dataset_name "
    "dataset_config_name train_file validation_file max_train_samples max_eval_samples streaming block_size "
    "overwrite_cache validation_split_percentage preprocessing_num_workers keep_linebreaks no_keep_linebreaks "
    "use_slow_tokenizer max_train_steps num_warmup_steps checkpointing_steps with_tracking hub_token "
    "evaluation_strategy overwrite_output_dir warmup_ratio no_cuda logging_dir group_by_length save_safetensors"
)


def problems_of(*words):
    with pytest.raises(ValueError) as error:
        read_settings([*DATA, *words])
    return str(error.value).split("\n")


def test_each_argument_of_transformers_is_in_one_class_alone():
    tables = [SAME, ALIASES, NO_EFFECT, REFUSED]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(SCRIPTS.split()) <= set().union(*tables)
    assert not FIELDS.keys() & (ALIASES.keys() | NO_EFFECT.keys() | REFUSED.keys()), "a setting is in the wrong class"
    assert SAME.keys() <= FIELDS.keys(), "not a setting"
    assert {target for target, _ in ALIASES.values()} <= FIELDS.keys()
    unknown = [f.name for f in dataclasses.fields(TrainingArguments) if not any(f.name in table for table in tables)]
    if unknown:  # of a newer transformers: no reason to fail
        warnings.warn(
            f"TrainingArguments has {', '.join(unknown)}, which settings/habits.py does not know", stacklevel=1
        )


def kinds_of(hint):
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
    return {float if member is int else member for member in members} - {type(None)}


@pytest.mark.parametrize("name", sorted({f.name for f in dataclasses.fields(TrainingArguments)} & SAME.keys()))
def test_a_setting_of_the_same_name_has_the_same_type_and_default_or_a_remark(name):
    theirs, ours = TrainingArguments.__dataclass_fields__[name], FIELDS[name]
    off = (None, False, "none", 0.0)
    same_default = theirs.default == ours.default or (theirs.default in off and ours.default in off)
    assert SAME[name] or (same_default and kinds_of(ours.type) & (kinds_of(theirs.type) | {str}))


def test_the_page_lists_them_as_they_are():
    assert (ROOT / "train_loop" / "settings" / "README.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(
    "words, setting, value",
    [
        ("--max_steps 10", "max_train_steps", 10),
        ("--max_steps=-1", "max_train_steps", None),
        ("--max-steps=10", "max_train_steps", 10),
        ("--warmup_steps 5", "num_warmup_steps", 5),
        ("--warmup_steps 0.1", "num_warmup_steps", 0.1),
        ("--warmup_ratio 0.1", "num_warmup_steps", 0.1),
        ("--warmup_ratio 0 --num_warmup_steps 5", "num_warmup_steps", 5),
        ("--warmup_ratio 0.1 --warmup_steps 0", "num_warmup_steps", 0.1),
        ("--warmup_steps 0 --warmup_ratio 0.1", "num_warmup_steps", 0.1),
        ("--save_steps 50", "checkpointing_steps", "50"),
        ("--save_strategy epoch --save_steps 50", "checkpointing_steps", "epoch"),
        ("--save_strategy steps --save_steps 50", "checkpointing_steps", "50"),
        ("--save_strategy steps", "checkpointing_steps", "500"),
        ("--save_strategy no", "checkpointing_steps", "none"),
        ("--save_total_limit 3", "checkpoints_total_limit", 3),
        ("--save_total_limit 0", "checkpoints_total_limit", None),
        ("--eval_strategy steps --eval_steps 7", "eval_steps", 7),
        ("--evaluation_strategy steps --logging_steps 9", "eval_steps", 9),
        ("--eval_strategy epoch --eval_steps 7", "eval_steps", None),
        ("--do_train --do_eval", "eval_only", False),
        ("--do_eval", "eval_only", True),
        ("--do_train False --do_eval True", "eval_only", True),
        ("--with_tracking", "report_to", ["all"]),
        ("--with_tracking --report_to tensorboard", "report_to", ["tensorboard"]),
        ("--auto_find_batch_size", "auto_micro_batch", True),
        ("--auto_find_batch_size false", "auto_micro_batch", False),
        ("--resume_from_checkpoint True", "resume_from_checkpoint", "auto"),
        ("--bf16 False --dtype float32 --optim adamw_torch --logging_strategy steps", "tuning", True),
    ],
)
def test_an_alias_is_stored_under_the_settings_own_name(words, setting, value):
    words = shlex.split(words)
    settings = read_settings([*DATA, *words])
    assert getattr(settings, setting) == value
    written = yaml.safe_load(as_recipe(settings))
    assert written[setting] == value and not written.keys() & ALIASES.keys()


def test_a_recipe_may_hold_aliases_and_a_flag_wins_over_them(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("max_steps: 10\nsave_strategy: epoch\nbf16: false\nfsdp: null\nresume_from_checkpoint: true\n")
    settings = read_settings([*DATA, f"--config={recipe}"])
    assert (settings.max_train_steps, settings.checkpointing_steps) == (10, "epoch")
    assert settings.resume_from_checkpoint == "auto"
    assert read_settings([*DATA, f"--config={recipe}", "--max_train_steps=20"]).max_train_steps == 20
    recipe.write_text("num_warmup_steps: 0.03\n")
    assert read_settings([*DATA, f"--config={recipe}", "--warmup_ratio=0"]).num_warmup_steps == 0
    recipe.write_text("fp16: true\nmax_steps: x\n")
    launched = "give it to the launcher: accelerate launch --mixed_precision fp16 train_loop/main.py ..."
    assert problems_of(f"--config={recipe}") == [
        f"recipe {recipe}: fp16: {launched}",
        f"recipe {recipe}: max_steps is 'x', but must be a whole number, at least 1",
    ]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_argument_names_what_to_give_instead(name):
    words = f"--{name}" if name not in ("data_seed", "optim", "dtype", "torch_dtype") else f"--{name}=7"
    if name in ("average_tokens_across_devices", "keep_linebreaks", "use_fast_tokenizer"):
        words += "=false"
    (problem,) = problems_of(words)
    assert problem.startswith(f"the command line: --{name}: ") and "did you mean" not in problem and len(problem) < 250
    for value in filter(None, REFUSED[name][1].split(",")):
        read_settings([*DATA, f"--{name}={value}"])


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_an_argument_without_effect_is_accepted_with_a_note(name, capsys):
    assert read_settings([*DATA, f"--{name}", "4"]) == read_settings(DATA)
    assert capsys.readouterr().err == f"note: {name} has no effect: {NO_EFFECT[name]}\n"


def test_two_names_for_one_setting_are_refused_where_they_differ():
    assert problems_of("--max_steps=3", "--max_train_steps=4") == [
        "the command line: --max_steps: max_train_steps is given too: give one of them"
    ]
    assert read_settings([*DATA, "--max_steps=3", "--max_train_steps=3"]).max_train_steps == 3


@pytest.mark.parametrize("flag", ["--ds_config", "--save_step_interval"])
def test_an_unknown_flag_is_not_taken_for_a_similar_one(flag):
    assert problems_of(flag, "4") == [f"the command line: {flag} is not a setting"]


def test_a_file_without_a_flag_is_answered_with_the_flag():
    assert problems_of("args.json") == [
        "the command line: 'args.json' is not the value of any flag; did you mean --config args.json?"
    ]


def test_the_old_name_of_wikitext_is_answered_with_the_hubs_name():
    problems = problems_of("--dataset_name=wikitext", "--dataset_config_name=wikitext-2-raw-v1", "--do_train")
    assert problems == ["dataset_name wikitext: the hub has it as Salesforce/wikitext; give that name"]


# the commands of transformers' own tests of these scripts, as they stand there, but for the model's and files' names
RUN_CLM = """
    --model_name_or_path {model} --train_file {text} --validation_file {text} --do_train --do_eval --block_size 128
    --per_device_train_batch_size 5 --per_device_eval_batch_size 5 --num_train_epochs 2 --output_dir {out}
    --overwrite_output_dir
"""
CONFIG_OVERRIDES = """
    --model_type gpt2 --tokenizer_name {model} --train_file {text} --output_dir {out}
    --config_overrides n_embd=10,n_head=2
"""
NO_TRAINER = """
    --model_name_or_path {model} --train_file {text} --validation_file {text} --block_size 128
    --per_device_train_batch_size 5 --per_device_eval_batch_size 5 --num_train_epochs 2 --output_dir {out}
    --checkpointing_steps epoch --with_tracking
"""


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A tiny model with its tokenizer, and a text of 13 blocks."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("run_clm")
    text = folder / "sample_text.txt"
    text.write_text("".join(topics[name] for name in sorted(topics))[:3000], encoding="utf-8")
    words = "--model_type=gpt2 --config_overrides=n_layer=1,n_head=2,n_embd=16 --tokenizer_vocab_size=300 --seed=1"
    words += f" --train_file={text} --validation_file={text} --output_dir={folder}/model --max_steps=1 --num_threads=1"
    assert main(words.split()) == 0
    return {"model": folder / "model", "text": text}


@pytest.mark.parametrize("command", [RUN_CLM, CONFIG_OVERRIDES, NO_TRAINER], ids=["clm", "overrides", "no_trainer"])
def test_commands_of_transformers_tests_run(command, names, tmp_path, capsys):
    words = command.format(**names, out=tmp_path / "out").split()
    # 5 % of a short file are less than a block of the default size
    more = ["--validation_split_percentage=50"] if command == CONFIG_OVERRIDES else []
    more += ["--report_to=none", "--num_threads=1"]  # importing all trackers takes seconds
    assert main([*words, *more]) == 0, capsys.readouterr().err
    assert "perplexity" in lines_of(tmp_path / "out")[-1]


def test_the_flag_that_they_add_on_a_cpu_is_answered(names, tmp_path, capsys):
    words = RUN_CLM.format(**names, out=tmp_path / "out").split()
    assert main([*words, "--use_cpu"]) == 1
    said = "--use_cpu: give it to the launcher: accelerate launch --config_file launch_configs/cpu.yaml"
    assert said in capsys.readouterr().err


def test_who_uses_run_clms_flags_is_told_what_differs_here(capsys):
    read_settings(["--model_name_or_path=m", "--dataset_name=d", "--do_eval"])
    error = capsys.readouterr().err
    assert error == "note: the default of block_size is 128; run_clm takes the model's positions, at most 1,024\n"
    read_settings(DATA)
    assert capsys.readouterr().err == ""


def test_downloads_and_prepared_data_go_into_the_cache_that_is_named(names, tmp_path):
    words = f"--model_name_or_path={names['model']} --validation_file={names['text']} --eval_only --max_eval_samples=2"
    done = run("train_loop/main.py", *words.split(), f"--cache_dir={tmp_path}/cache", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").iterdir()) and not (tmp_path / "home").exists()


def test_a_run_has_the_name_that_it_was_given_in_a_tracker(names, tmp_path, monkeypatch):
    for name, value in {
        "ALLOW_FILE_STORE": "true",
        "DISABLE_TELEMETRY": "true",
        "TRACKING_URI": f"file:{tmp_path}/m",
    }.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    from mlflow import MlflowClient

    words = f"--model_name_or_path={names['model']} --train_file={names['text']} --validation_file={names['text']}"
    words += f" --output_dir={tmp_path}/out --max_steps=1 --num_threads=1 --report_to=mlflow --run_name=mine"
    assert main(words.split()) == 0
    client = MlflowClient(f"file:{tmp_path}/m")
    (experiment,) = (e for e in client.search_experiments() if e.name == "train_loop")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "mine"
