"""The hub, over HTTP: a real client against a server on loopback (hub_server.py)."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import EXPORTED, LAUNCH, ONLINE, READ_TOKEN, TINY, TOKEN, assert_same_run, run, run_program, save_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from train_loop import hub as our_hub
from train_loop import publish
from train_loop.main import main
from train_loop.publish.publisher import Publisher
from train_loop.settings.command_line import read_settings

# the names on the hub of what a run exports
PUSHED = EXPORTED - {"evaluations"} | {"evaluations/block_nats.safetensors"}


@pytest.fixture
def logged_in(healthy, monkeypatch, tmp_path):
    """This process is one that uses the hub, with a token that may write."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name, value in healthy.environment(tmp_path / "cache", TOKEN).items():
        monkeypatch.setenv(name, value)
    return healthy


def short(text_file, output_dir, *more):
    """The arguments of a run of two optimizer steps that is to be pushed."""
    arguments = [*TINY, "--max_eval_samples=8", "--max_train_steps=2", f"--train_file={text_file}"]
    return [*arguments, f"--output_dir={output_dir}", "--push_to_hub", *more]


def repeat_command(text):
    return shlex.split(re.search(r"To push it: (hf upload .*)", text).group(1))


def assert_token_is_nowhere(output_dir, *texts):
    for text in [*texts, *(path.read_bytes().decode(errors="replace") for path in files_in(output_dir))]:
        assert TOKEN not in text and READ_TOKEN not in text


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_reference_recipe_runs_from_download_to_push_and_the_model_is_found_by_its_name(healthy, tmp_path):
    """The recipe's own names. Then another machine, with a cache of its own and no token, asks for what was pushed."""
    output_dir = tmp_path / "runs" / "distilgpt2-finetuned-wikitext2"
    launcher = (*ONLINE, *LAUNCH, "--quiet", "train_loop/main.py")
    arguments = ["--config=distilgpt2_wikitext2", "--num_train_epochs=1", f"--output_dir={output_dir}", "--push_to_hub"]
    environment = healthy.environment(tmp_path / "cache", TOKEN)
    done = run(*arguments, launcher=launcher, **environment)
    assert done.returncode == 0, done.stderr
    assert f"pushed: {healthy.address}/me/distilgpt2-finetuned-wikitext2" in done.stdout.splitlines()
    assert TOKEN in {token for *_, token in healthy.requests} and "warning:" not in done.stderr
    assert_token_is_nowhere(output_dir, done.stdout, done.stderr)

    pushed = healthy.files("models", "me/distilgpt2-finetuned-wikitext2")
    assert pushed.keys() == PUSHED | {".gitattributes"}
    assert all(pushed[name] == (output_dir / name).read_bytes() for name in PUSHED)
    assert (output_dir / "checkpoints").is_dir()
    assert healthy.visibility["models", "me/distilgpt2-finetuned-wikitext2"] == "public"

    card = pushed["README.md"].decode()
    assert 'model="me/distilgpt2-finetuned-wikitext2"' in card
    assert "\nlicense: apache-2.0\n" in card and "\nlanguage:\n- en\n" in card

    environment = healthy.environment(tmp_path / "another cache")
    name = "me/distilgpt2-finetuned-wikitext2"
    generated = run_program("generates.py", name, launcher=(*ONLINE, sys.executable), **environment)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("The value") and len(generated.stdout.strip()) > len("The value")


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="transformers asks for some of the tokenizer's files on the main branch",
)
def test_the_revision_of_a_model_is_the_one_that_is_asked_for(healthy, text_file, tmp_path):
    sha = healthy.sha("models", "distilbert/distilgpt2")
    arguments = ["--model_name_or_path=distilgpt2", f"--validation_file={text_file}", "--eval_only", "--block_size=64"]
    runs = [("train_loop.main", [*arguments, f"--model_revision={revision}"]) for revision in (sha, "nowhere")]
    launcher, environment = (*ONLINE, sys.executable), healthy.environment(tmp_path / "cache")
    done = run_program("one_after_the_other.py", json.dumps(runs), launcher=launcher, **environment)
    assert re.findall(r"^exit status (\d)", done.stdout, re.MULTILINE) == ["0", "1"], done.stdout + done.stderr
    asked = [path for _, path, *_ in healthy.requests if path.startswith("/distilbert/distilgpt2/resolve/")]
    assert {path.split("/")[4] for path in asked} == {sha, "nowhere"}
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "nowhere" in error


TROUBLE = {
    "an error of the server": ("commit/main", 500, "500 Internal Server Error"),
    "a token that is no good": ("repos/create", 401, "401 Unauthorized"),
    "a token that may not write here": ("commit/main", 403, "403 Forbidden"),
    "a dropped connection": ("commit/main", "drop", "disconnected"),
    "no answer": ("commit/main", "hang", "not finished after 4 seconds"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_failed_push_is_a_warning_and_a_command_that_repeats_it(
    trouble, logged_in, text_file, tmp_path, capsys, monkeypatch
):
    path, how, said = TROUBLE[trouble]
    logged_in.fail(path, how)
    if how == "hang":
        monkeypatch.setattr("train_loop.publish.upload.PUSH_SECONDS", 4)
    output_dir = tmp_path / trouble.replace(" ", "-")
    began = time.perf_counter()
    assert main(short(text_file, output_dir)) == 0
    assert time.perf_counter() - began < 200, "seconds; a push that is not given up lasts for 300"
    out, err = capsys.readouterr()
    assert out.splitlines()[-2].startswith("done:")
    (warning,) = [line for line in err.splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: not pushed: ") and said in warning and "Traceback" not in err
    assert (output_dir / "checkpoints" / "step-000002" / "manifest.json").is_file()
    assert {path.name for path in output_dir.iterdir()} == EXPORTED | {"checkpoints"}
    AutoModelForCausalLM.from_pretrained(output_dir)
    assert_token_is_nowhere(output_dir, out, err)

    logged_in.heal()
    command = repeat_command(warning)
    done = run(*command[1:], launcher=(*ONLINE, Path(sys.executable).parent / command[0]))
    assert done.returncode == 0, done.stderr
    pushed = logged_in.files("models", f"me/{output_dir.name}")
    assert pushed.keys() == PUSHED | {".gitattributes"}
    assert pushed["model.safetensors"] == (output_dir / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "code, problem",
    [
        ("print('all is well')", None),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "stopped by SIGTERM"),
        ("import sys; print('Error: first', 'second.', 'Hint: third', sep=chr(10)); sys.exit(1)", "first second"),
        ("raise ConnectionError('no way out')", "no way out"),
        ("import sys; print('one', 'two', sep=chr(10)); sys.exit(3)", "two"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("while True: pass", "not finished after 1 seconds"),
    ],
)
def test_why_the_client_failed_is_said_on_one_line(code, problem):
    client = our_hub.Client(["-c", code], 1 if "while" in code else 60)
    client.wait()
    assert client.problem() == problem


def test_a_read_only_token_is_noticed_at_the_start_and_is_no_error(logged_in, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert main(short(text_file, tmp_path / "run")) == 0
    out, err = capsys.readouterr()
    first, last = [line for line in err.splitlines() if line.startswith("warning")]
    assert "this token can only read" in first
    assert "not pushed: 403 Forbidden" in last and repeat_command(last)[2] == "me/run"
    assert_token_is_nowhere(tmp_path / "run", out, err)


def test_a_hub_out_of_reach_is_a_warning_and_the_push_is_tried_all_the_same(
    logged_in, nobody_there, text_file, tmp_path, capsys, monkeypatch
):
    """At the start nobody listens; at the end the hub is there."""
    there = os.environ["HF_ENDPOINT"]
    monkeypatch.setenv("HF_ENDPOINT", nobody_there)
    push = publish.push

    def push_later(*arguments):
        monkeypatch.setenv("HF_ENDPOINT", there)
        push(*arguments)

    monkeypatch.setattr(publish, "push", push_later)
    assert main(short(text_file, tmp_path / "late")) == 0
    out, err = capsys.readouterr()
    (warning,) = [line for line in err.splitlines() if line.startswith("warning")]
    assert f"{nobody_there} cannot be reached now" in warning and "pushed:" in out
    assert 'model="OWNER/late"' in (tmp_path / "late" / "README.md").read_text()
    assert logged_in.files("models", "me/late").keys() == PUSHED | {".gitattributes"}


def test_without_a_token_a_push_is_refused_before_anything_else(logged_in, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert main(short(text_file, tmp_path / "run")) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "error: push_to_hub needs a token that can write: set HF_TOKEN, or log in with `hf auth login`"
    ]
    assert out == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, environment, said",
    [
        (["--hub_model_id=a/b/c"], {}, "'a/b/c' is not a valid repository name"),
        ([], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, so push_to_hub cannot work: give one of the two"),
    ],
)
def test_a_push_that_cannot_succeed_is_refused(
    arguments, environment, said, logged_in, text_file, tmp_path, capsys, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(short(text_file, tmp_path / "run", *arguments)) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--hub_model_id=me/x"], "hub_model_id needs push_to_hub"),
        (["--hub_private_repo"], "hub_private_repo needs push_to_hub"),
        (["--hub_strategy=every_save"], "hub_strategy needs push_to_hub"),
        (["--push_to_hub", "--hub_strategy=checkpoint"], "must be text, one of end, every_save"),
        (["--push_to_hub", "--hub_strategy=every_save", "--checkpointing_steps=none"], "checkpointing_steps is none"),
        (["--push_to_hub", "--eval_only"], "push_to_hub or eval_only"),
    ],
)
def test_settings_of_publishing_that_fight_are_refused(arguments, said, text_file):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_settings(["--model_name_or_path=m", f"--train_file={text_file}", "--output_dir=o", *arguments])


def test_a_private_repository_arrives_as_one_and_a_second_push_changes_only_what_changed(
    logged_in, text_file, tmp_path, capsys
):
    """The second push is made by the command that resumes a finished run."""
    arguments = short(text_file, tmp_path / "run", "--hub_model_id=me/secret", "--hub_private_repo")
    assert main(arguments) == 0
    assert logged_in.visibility["models", "me/secret"] == "private"
    assert main([*arguments, "--resume_from_checkpoint=auto"]) == 0
    out = capsys.readouterr().out
    assert "is finished: 2 steps" in out and out.count("pushed: ") == 2
    assert len(logged_in.commits["models", "me/secret"]) == 2  # the initial commit, and the first push


def test_each_checkpoint_is_pushed_and_training_does_not_notice(logged_in, text_file, tmp_path, capsys, monkeypatch):
    """The same weights as without, bit for bit. The steps here are faster than a push, so they wait for it."""
    arguments = [*TINY, "--max_eval_samples=8", "--max_train_steps=6", f"--train_file={text_file}", "--logging_steps=1"]
    arguments += ["--checkpointing_steps=2"]
    begin = Publisher.push_checkpoint

    def push_and_wait(self, *arguments):
        begin(self, *arguments)
        self.client.wait()

    monkeypatch.setattr(Publisher, "push_checkpoint", push_and_wait)
    often = [*arguments, f"--output_dir={tmp_path}/often", "--push_to_hub", "--hub_strategy=every_save"]
    assert main(often) == 0 and "warning:" not in capsys.readouterr().err
    assert logged_in.commits["models", "me/often"][1:-1] == ["step 2", "step 4"]
    assert logged_in.files("models", "me/often").keys() == PUSHED | {".gitattributes"}
    assert not (tmp_path / "often" / "checkpoints" / "pushed").exists()

    monkeypatch.undo()
    assert main([*arguments, f"--output_dir={tmp_path}/never"]) == 0
    assert_same_run(tmp_path / "often", tmp_path / "never")


def test_what_is_pushed_of_a_checkpoint_is_its_model(logged_in, text_file, tmp_path):
    """The run is stopped by a signal after its first push, and what is on the hub then is loaded."""
    arguments = short(text_file, tmp_path / "run", "--hub_strategy=every_save", "--checkpointing_steps=2")
    arguments += ["--max_train_steps=5000", "--checkpoints_total_limit=5000"]

    def stop_when_pushed():
        while ("POST", "/api/models/me/run/commit/main") not in {request[:2] for request in logged_in.requests}:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_pushed, daemon=True)
    thread.start()
    assert main(arguments) == 75
    thread.join()
    files = logged_in.files("models", "me/run")
    assert files.keys() == EXPORTED - {"all_results.json", "evaluations", "loss_curve.png"} | {".gitattributes"}
    card = files["README.md"].decode()
    assert "Validation" in card and "loss_curve.png" not in card
    model, info = AutoModelForCausalLM.from_pretrained(logged_in.path("models", "me/run"), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.use_cache
    step = int(re.fullmatch(r"step (\d+)", logged_in.commits["models", "me/run"][-1]).group(1))
    saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "model.safetensors")
    assert all(model.get_parameter(name).equal(tensor) for name, tensor in saved.items())


def test_with_lora_a_checkpoint_is_pushed_as_the_merged_model_and_the_adapter(
    logged_in, text_file, tmp_path, monkeypatch
):
    """A checkpoint holds what is trained alone; the frozen weights come from the model in memory."""
    peft = pytest.importorskip("peft")
    base = save_model(tmp_path / "base", text_file)
    begin = Publisher.push_checkpoint

    def push_wait_and_fetch(self, *arguments):
        begin(self, *arguments)
        self.client.wait()
        shutil.copytree(logged_in.path("models", "me/run"), tmp_path / "pushed")

    monkeypatch.setattr(Publisher, "push_checkpoint", push_wait_and_fetch)
    arguments = [f"--model_name_or_path={base}", f"--train_file={text_file}", "--lora_r=2", "--learning_rate=0.1"]
    arguments += ["--block_size=32", "--max_eval_samples=8", "--max_train_steps=3", "--checkpointing_steps=2"]
    arguments += ["--num_threads=1", "--push_to_hub", "--hub_strategy=every_save"]
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pushed", output_loading_info=True)
    assert not any(info.values()), info
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "pushed" / "adapter"
    )
    merged = adapted.merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors")
    adapter = load_file(tmp_path / "pushed" / "adapter" / "adapter_model.safetensors")
    assert all(adapter[f"base_model.model.{n.replace('.default', '')}"].equal(tensor) for n, tensor in saved.items())


def test_checkpoints_that_cannot_be_pushed_are_warnings(logged_in, text_file, tmp_path, capsys):
    """The first push hangs: those of later steps are skipped, training continues, and the run's end does not wait."""
    logged_in.fail("repos/create", "hang")
    arguments = short(text_file, tmp_path / "run", "--checkpointing_steps=2", "--hub_strategy=every_save")
    began = time.perf_counter()

    def heal_at_the_end():
        while not (tmp_path / "run" / "all_results.json").exists():
            time.sleep(0.02)
        logged_in.heal()

    thread = threading.Thread(target=heal_at_the_end, daemon=True)
    thread.start()
    assert main([*arguments, "--max_train_steps=6"]) == 0
    thread.join()
    out, err = capsys.readouterr()
    assert "warning: step 4 is not pushed: the push of step 2 is still running" in err.splitlines()
    assert "pushed: " in out and time.perf_counter() - began < 200, "seconds; a push that hangs lasts for 300"
    assert logged_in.commits["models", "me/run"] == ["initial commit", "Upload folder using huggingface_hub"]


def test_a_stop_signal_in_the_push_ends_the_push_and_the_run_is_done(logged_in, text_file, tmp_path, capsys):
    logged_in.fail("commit/main", "hang")

    def stop_in_the_push():
        while "hang" not in {status for _, _, status, _ in logged_in.requests}:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_in_the_push, daemon=True)
    thread.start()
    assert main(short(text_file, tmp_path / "run")) == 0
    thread.join()
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning.startswith("warning: not pushed: stopped by SIGTERM.") and repeat_command(warning)
    assert {path.name for path in (tmp_path / "run").iterdir()} == EXPORTED | {"checkpoints"}
