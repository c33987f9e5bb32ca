"""The whole command, from settings to generated text."""

import json
import math
import re
import shlex
import shutil
import sys

import pytest
import torch
import yaml
from conftest import (
    EXPORTED,
    LAUNCH,
    PROGRAMS,
    ROOT,
    TINY,
    TINY_CONFIGS,
    assert_lines_agree,
    assert_same_run,
    largest_difference,
    lines_of,
    run,
    shows,
    weights_of,
    without_timings,
)
from forks import LAUNCHED, forked
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from train_loop.main import main


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    """The folder of a finished run of two epochs: 100 blocks, 8 at a time, 13 steps an epoch."""
    output_dir = tmp_path_factory.mktemp("runs") / "trained"
    assert main([*TINY, f"--train_file={text_file}", "--num_train_epochs=2", f"--output_dir={output_dir}"]) == 0
    return output_dir


def test_a_run_leaves_every_file_that_is_promised(trained):
    assert {path.name for path in trained.iterdir()} == EXPORTED | {"checkpoints"}
    results = json.loads((trained / "all_results.json").read_text())
    assert results["step"] == 26
    assert results["epoch"] == 2
    assert results["train_tokens"] == 2 * 100 * 31
    assert results["perplexity"] == math.exp(results["eval_loss"])
    assert 0.1 < results["peak_memory_gib"] < 24
    assert results["checkpoint_runtime"] > 0  # seconds, of four saves
    picture = imread(trained / "loss_curve.png")  # training, validation, learning rate
    assert all(shows(picture, colour) for colour in ("tab:blue", "tab:orange", "tab:gray"))


def test_metrics_have_a_line_for_each_logged_step_and_each_evaluation(trained):
    lines = lines_of(trained)
    training = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in training] == [5, 10, 13, 15, 20, 25, 26]
    assert [line["step"] for line in evaluation] == [0, 13, 26]
    assert evaluation[0]["perplexity"] > 2 * evaluation[-1]["perplexity"]
    assert training[-1]["tokens_seen"] == 2 * 100 * 31
    assert training[-1]["learning_rate"] == pytest.approx(1e-2 / 26)  # the last step's; after it, it is 0


def test_the_exported_folder_generates_with_the_plain_pipeline(trained):
    text = pipeline("text-generation", str(trained))("The value", max_new_tokens=5)[0]["generated_text"]
    assert text.startswith("The value") and len(text) > len("The value")
    assert AutoModelForCausalLM.from_pretrained(trained).config.use_cache


def test_generate_writes_as_many_continuations_as_asked_for(trained, capsys):
    from train_loop.generate import main as generate

    generate([str(trained), "The value", "--max_new_tokens", "5", "--num_return_sequences", "2"])
    assert len(capsys.readouterr().out.split("\n---\n")) == 2


def test_whoever_may_read_the_card_may_read_the_weights(trained):
    assert (trained / "model.safetensors").stat().st_mode == (trained / "README.md").stat().st_mode


def test_the_exported_folder_evaluates_to_the_last_loss_exactly(trained, text_file, capsys, tmp_path):
    # the held-out rows again: the same file, and the same share of it
    arguments = ["--block_size=32", "--max_eval_samples=30", f"--train_file={text_file}", "--eval_only"]
    arguments += ["--num_threads=1"]  # as in training: another number may sum in another order
    assert main([f"--model_name_or_path={trained}", *arguments, f"--output_dir={tmp_path}/evaluated"]) == 0
    shown = dict(re.findall(r"^(\w+) +([\d.,]+)$", capsys.readouterr().out, re.MULTILINE))
    last = lines_of(trained)[-1]
    assert shown["eval_loss"] == f"{last['eval_loss']:.4f}"
    evaluated = json.loads((tmp_path / "evaluated" / "all_results.json").read_text())
    assert evaluated["eval_loss"] == last["eval_loss"]


def test_the_banner_says_what_is_held_out_and_how_a_step_comes_about(trained, text_file, tmp_path, capsys):
    arguments = [f"--model_name_or_path={trained}", f"--train_file={text_file}", "--block_size=32"]
    arguments += ["--max_eval_samples=2", f"--output_dir={tmp_path}/run"]
    more = ["--per_device_train_batch_size=3", "--gradient_accumulation_steps=2", "--max_train_steps=1"]
    for extra in ["--eval_only"], [*more, "--overwrite_output_dir"]:
        assert main([*arguments, *extra]) == 0
        banner = " ".join(capsys.readouterr().out.split())
        assert re.search(r"held out the last \d+ of [\d,]+ training rows", banner)
    assert "micro-batch 3 x accumulation 2 x processes 1 = 6 blocks = 192 tokens" in banner


def test_train_config_runs_the_same_job_again(trained, tmp_path):
    again = tmp_path / "again"
    assert main(["--config", str(trained / "train_config.yaml"), f"--output_dir={again}"]) == 0
    assert_same_run(again, trained)


def test_the_model_card_names_the_data_and_shows_the_losses(trained):
    card = (trained / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-generation"
    last = lines_of(trained)[-1]
    assert "prose.txt" in card and f"{last['eval_loss']:.4f}" in card and "learning_rate: 0.01" in card


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_every_family_of_models_trains_and_reloads(model_type, text_file, tmp_path):
    overrides = ",".join(f"{name}={value}" for name, value in TINY_CONFIGS[model_type].items())
    arguments = [*TINY, f"--model_type={model_type}", f"--config_overrides={overrides}", f"--train_file={text_file}"]
    assert main([*arguments, "--max_train_steps=6", f"--output_dir={tmp_path}/run"]) == 0
    evaluation = [line for line in lines_of(tmp_path / "run") if "eval_loss" in line]
    assert evaluation[-1]["eval_loss"] < evaluation[0]["eval_loss"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) == model.get_input_embeddings().num_embeddings


def test_a_pretrained_model_starts_at_its_own_loss(trained, text_file, tmp_path):
    arguments = ["--block_size=32", "--max_eval_samples=30", f"--train_file={text_file}", "--max_train_steps=2"]
    arguments += ["--num_threads=1"]  # as before: another number may sum in another order
    assert main([f"--model_name_or_path={trained}", *arguments, f"--output_dir={tmp_path}/more"]) == 0
    assert lines_of(tmp_path / "more")[0]["eval_loss"] == lines_of(trained)[-1]["eval_loss"]


def test_a_used_output_dir_is_refused_and_overwritten_only_on_request(trained, text_file, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("kept")
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=1", f"--output_dir={tmp_path}"]
    for more in [], ["--overwrite_output_dir"]:  # a folder that no run made
        assert main([*arguments, *more]) == 1
        assert "is not empty" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert main(arguments) == 1
    assert "delete it with --overwrite_output_dir" in capsys.readouterr().err
    assert main([*arguments, "--overwrite_output_dir"]) == 0
    assert (tmp_path / "precious.txt").read_text() == "kept"
    assert f"files in {tmp_path} that no run made are kept: precious.txt\n" in capsys.readouterr().err
    assert lines_of(tmp_path)[-1]["step"] == 1


def test_a_compiled_run_exports_plain_names_and_tied_weights(text_file, tmp_path):
    """The eager backend of torch.compile: the wrapper is the same, and no C++ compiler is needed. Tolerance: a
    hundredth of the learning rate."""
    commands = {}
    for model_type in ("gpt2", "llama"):
        overrides = ",".join(f"{name}={value}" for name, value in TINY_CONFIGS[model_type].items())
        shape = [f"--model_type={model_type}", f"--config_overrides={overrides},tie_word_embeddings=true"]
        commands[model_type] = [*TINY, *shape, f"--train_file={text_file}", "--max_train_steps=3"]
    compiled = [["train_loop.main", [*words, f"--output_dir={tmp_path}/{name}"]] for name, words in commands.items()]
    environment = {**LAUNCHED, "ACCELERATE_DYNAMO_BACKEND": "EAGER"}
    done = forked(PROGRAMS / "one_after_the_other.py", json.dumps(compiled), **environment)
    assert done.stdout.count("exit status 0") == 2, done.stderr
    for name, words in commands.items():
        assert main([*words, f"--output_dir={tmp_path}/plain {name}"]) == 0
        compiled, plain = weights_of(tmp_path / name), weights_of(tmp_path / f"plain {name}")
        assert largest_difference(compiled, plain) < 1e-4 and "lm_head.weight" not in plain
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_tokens_per_second_and_peak_memory_are_those_of_the_process(text_file, tmp_path):
    """A loss that sleeps in training for 20 ms, and in evaluation for 200 ms, and at the end 200 MiB held for a moment.
    Tokens per second must see the first sleep and not the second, peak memory the moment."""
    arguments = [*TINY, f"--train_file={text_file}", "--num_train_epochs=1", "--eval_steps=4", "--max_eval_samples=8"]
    arguments += [f"--output_dir={tmp_path}/run"]
    done = forked(PROGRAMS / "slow_and_hungry.py", *arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    measured = {name: float(value) for name, value in re.findall(r"^(loop|peak) (\S+)$", done.stdout, re.MULTILINE)}
    # 13 steps, and 5 evaluations of a batch; a busy machine makes a sleep longer, never shorter
    assert 13 * 0.02 < results["train_runtime"] < measured["loop"] - 5 * 0.2
    assert results["tokens_per_second"] == results["train_tokens"] / results["train_runtime"]
    assert results["train_tokens"] == 100 * 31
    assert results["peak_memory_gib"] == pytest.approx(measured["peak"], abs=0.15)  # below the 0.2 that were held


def test_the_plain_launch_uses_all_cores(text_file, tmp_path):
    """The launcher sets OMP_NUM_THREADS=1 by itself: the banner must say as many threads as there are cores."""
    from train_loop.tuning import num_cores

    arguments = [word for word in TINY if not word.startswith("--num_threads")]
    arguments += [f"--train_file={text_file}", "--max_train_steps=1", f"--output_dir={tmp_path}/run"]
    done = run("train_loop/main.py", *arguments, launcher=LAUNCH)
    assert done.returncode == 0, done.stderr
    assert f"world size 1, {num_cores()} CPU threads" in done.stdout


@pytest.mark.parametrize(
    "processes, num_blocks, micro_batch, accumulation", [(2, 100, 4, 1), (3, 100, 2, 2), (3, 2, 1, 1)]
)
def test_several_processes_give_the_losses_and_weights_of_one(
    processes, num_blocks, micro_batch, accumulation, text_file, tmp_path
):
    """The last run has fewer blocks than processes, in training and in evaluation. Tolerance: sums in another order, in
    float32. For the weights a hundredth of the learning rate: AdamW makes such steps from the rounding of a gradient
    that is zero."""
    arguments = [*TINY, f"--train_file={text_file}", "--num_train_epochs=1", "--logging_steps=1", "--eval_steps=4"]
    arguments += ["--learning_rate=1e-3", f"--max_train_samples={num_blocks}"]
    arguments += [f"--max_eval_samples={min(num_blocks, 30)}"]
    arguments += ["--config_overrides=n_layer=1,n_head=2,n_embd=32,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"]
    batch = [f"--per_device_train_batch_size={micro_batch}", f"--gradient_accumulation_steps={accumulation}"]
    done = forked("train_loop/main.py", *arguments, *batch, f"--output_dir={tmp_path}/two", processes=processes)
    assert done.returncode == 0, done.stderr
    assert f"world size {processes}" in done.stdout and "abort" not in done.stderr.lower()
    whole = processes * micro_batch * accumulation
    assert main([*arguments, f"--per_device_train_batch_size={whole}", f"--output_dir={tmp_path}/one"]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert lines_of(two)[-1]["step"] == math.ceil(num_blocks / whole)
    assert_lines_agree(without_timings(two), without_timings(one))
    assert largest_difference(weights_of(two), weights_of(one)) < 1e-5
    nats = [load_file(folder / "evaluations" / "block_nats.safetensors") for folder in (one, two)]
    torch.testing.assert_close(*nats, rtol=1e-4, atol=0)


def test_dropout_differs_from_process_to_process(tmp_path):
    """Blocks that are all the same, so that the first step of two processes has the loss of one, but for dropout."""
    (tmp_path / "same.txt").write_text("a" * 2000)
    arguments = ["--model_type=gpt2", "--config_overrides=n_layer=1,n_head=2,n_embd=32,n_positions=64"]
    arguments += ["--tokenizer_vocab_size=257", "--block_size=32", "--max_train_steps=1", "--logging_steps=1"]
    arguments += ["--per_device_train_batch_size=1", "--num_threads=1"]
    arguments += [f"--{name}_file={tmp_path}/same.txt" for name in ("train", "validation")]
    done = forked("train_loop/main.py", *arguments, f"--output_dir={tmp_path}/two", processes=2)
    assert done.returncode == 0, done.stderr
    assert main([*arguments, f"--output_dir={tmp_path}/one"]) == 0
    two, one = (lines_of(tmp_path / name) for name in ("two", "one"))
    assert two[0]["eval_loss"] == pytest.approx(one[0]["eval_loss"], rel=1e-6)
    assert abs(two[1]["loss"] - one[1]["loss"]) > 1e-4


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_as_many_threads_tokenise_as_were_asked_for(trained, text_file, tmp_path):
    arguments = [f"--model_name_or_path={trained}", f"--validation_file={text_file}", "--eval_only", "--block_size=32"]
    arguments.append("--tuning=false")  # no idle threads on a busy machine
    done = forked(PROGRAMS / "num_threads.py", *arguments, HF_DATASETS_CACHE=tmp_path)
    one, six = map(int, re.findall(r"^threads (\d+)$", done.stdout, re.MULTILINE))
    assert six - one == 5, done.stdout + done.stderr


def test_the_quickstart_trains_in_the_way_readme_says(tmp_path):
    """README's first command, but for the installation and the length: 40 steps of its 118."""
    command = re.search(r"^python -m pip install -e \. && (.*)$", (ROOT / "README.md").read_text(), re.M).group(1)
    train, generate = (shlex.split(part) for part in command.split(" && "))
    assert train[:3] == ["accelerate", "launch", "train_loop/main.py"]
    assert main([*train[3:], "--max_train_steps=40", f"--output_dir={tmp_path}/quickstart"]) == 0
    evaluation = [line for line in lines_of(tmp_path / "quickstart") if "eval_loss" in line]
    assert evaluation[-1]["perplexity"] < evaluation[0]["perplexity"] / 6
    done = forked(*generate[1:3], tmp_path / "quickstart", *generate[4:])
    assert done.returncode == 0 and done.stdout.startswith(generate[4])
