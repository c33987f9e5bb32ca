"""The changes in `changes/`, which train_loop/README.md lists: each is applied to a copy of the package, and run."""

import importlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, assert_same_run, copy_until, lines_of
from forks import forked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

CHANGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "changes").glob("*.patch")}
SHORT = ["--max_train_steps=6", "--logging_steps=1", "--checkpointing_steps=3", "--num_threads=1"]


def test_each_change_has_at_most_twenty_lines_in_one_or_two_files():
    for diff in CHANGES.values():
        assert len(re.findall(r"^\+\+\+ ", diff, re.MULTILINE)) <= 2
        assert 0 < len(re.findall(r"^[+-](?!\+\+ |-- )", diff, re.MULTILINE)) <= 20


def edited(diff):
    return [line for line in diff.splitlines() if re.match(r"[+-](?!\+\+ |-- )", line) and "import " not in line]


def test_the_pages_lead_to_each_change_and_readme_shows_three_as_they_are():
    page = (ROOT / "train_loop" / "README.md").read_text(encoding="utf-8")
    for name, num_lines in re.findall(r"tests/changes/(\w+)\.patch\) \| (\d+) \|", page):
        assert len(re.findall(r"^[+-](?!\+\+ |-- )", CHANGES[name], re.MULTILINE)) == int(num_lines), name
    assert set(re.findall(r"tests/changes/(\w+)\.patch", page)) == CHANGES.keys()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [block.splitlines() for block in re.findall(r"^```diff\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)]
    assert shown == [edited(CHANGES[name]) for name in ("focal_loss", "optimizer", "metric")]


@pytest.fixture
def change(tmp_path, monkeypatch):
    """A function that applies a change to a copy of the package in tmp_path, which takes the package's place until the
    test is over, and returns the copy's `main`."""
    plain = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "train_loop"}

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "train_loop"]:
            del sys.modules[name]

    def apply(name):
        shutil.copytree(ROOT / "train_loop", tmp_path / "train_loop")
        subprocess.run(["git", "apply", "-"], input=CHANGES[name], cwd=tmp_path, text=True, check=True)
        forget()
        module = importlib.import_module("train_loop.main")
        assert Path(module.__file__).parent.parent == tmp_path
        return module.main

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield apply
    forget()
    sys.modules.update(plain)


@pytest.fixture(scope="module")
def base(text_file, tmp_path_factory):
    """The folder of a small trained model."""
    from train_loop.main import main

    output_dir = tmp_path_factory.mktemp("base") / "run"
    assert main([*TINY, f"--train_file={text_file}", "--num_train_epochs=8", f"--output_dir={output_dir}"]) == 0
    return output_dir


def resume_from_step_3(main, arguments, output_dir):
    """Goes on with a copy of a finished run as a kill after step 3 would have left it; returns the copy."""
    resumed = output_dir.with_name("resumed")
    copy_until(3, output_dir, resumed)
    assert main([*arguments, f"--output_dir={resumed}", "--resume_from_checkpoint=auto"]) == 0
    return resumed


def test_the_focal_loss_is_trained_without_full_logits_and_validation_stays_plain(change, base, text_file, tmp_path):
    """On a trained model, values and gradients against autograd through full logits. Tolerance: float32 rounding."""
    main = change("focal_loss")
    from train_loop.loss import next_token_loss
    from train_loop.probes import head_of

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids % 5 == 0, -100)
    loss, _, extras = next_token_loss(model, {"input_ids": ids, "labels": labels})
    assert head_of(model).in_chunks
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    nats = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
    wanted = ((1 - torch.exp(-nats)) ** 2 * nats).sum()
    torch.testing.assert_close((loss, extras["nll"]), (wanted, nats.sum()), rtol=1e-5, atol=0, check_stride=False)
    gradients = [torch.autograd.grad(x, list(model.parameters()), retain_graph=True) for x in (loss, wanted)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    arguments = [f"--model_name_or_path={base}", f"--train_file={text_file}", "--block_size=32", "--learning_rate=1e-3"]
    arguments += [*SHORT, "--max_train_samples=48", "--max_eval_samples=4"]
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    lines = lines_of(tmp_path / "run")
    assert all(line["eval_objective"] < line["eval_loss"] == line["eval_nll"] for line in lines if "eval_loss" in line)
    assert all(line["loss"] < 0.98 * line["nll"] for line in lines if "nll" in line)


def test_tokens_of_a_single_byte_count_twice_in_training_alone(change, text_file, tmp_path):
    main = change("weights_of_tokens")
    assert main([*TINY, *SHORT, f"--train_file={text_file}", f"--output_dir={tmp_path}/run"]) == 0
    lines = lines_of(tmp_path / "run")
    assert all(1 < line["loss"] / line["nll"] < 2 for line in lines if "nll" in line)
    assert all(line["eval_objective"] > line["eval_loss"] == line["eval_nll"] for line in lines if "eval_loss" in line)

    from train_loop.data.blocks import inputs_and_labels
    from train_loop.loss import next_token_loss

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    batch = {name: torch.from_numpy(array) for name, array in inputs_and_labels(ids.numpy()).items()}
    nats = F.cross_entropy(model(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    wanted = (nats * (1 + (ids[:, 1:] < 256).float())).sum()
    assert next_token_loss(model, batch)[0].item() == pytest.approx(wanted.item(), rel=1e-5)  # sums of float32


def test_distillation_moves_the_student_towards_a_frozen_teacher(change, base, text_file, tmp_path):
    main = change("distillation")
    from train_loop import loss

    shutil.copytree(base, tmp_path / "runs" / "teacher")
    student = ["--model_type=gpt2", "--config_overrides=n_layer=1,n_head=2,n_embd=16,n_positions=64"]
    student += [f"--tokenizer_name={base}", f"--train_file={text_file}", "--block_size=32", "--learning_rate=3e-2"]
    arguments = [*student, *SHORT, "--max_train_samples=48", "--max_eval_samples=4"]
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    lines = [line for line in lines_of(tmp_path / "run") if "kl" in line]
    assert len(lines) == 6 and lines[-1]["kl"] < 0.8 * lines[0]["kl"]
    for line in lines:
        assert line["loss"] == pytest.approx(0.5 * line["nll"] + 0.5 * line["kl"], rel=1e-6)

    teacher = loss.teacher(torch.device("cpu"))
    before = load_file(base / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items() if name in before)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids % 5 == 0, -100)
    got, num_targets, extras = loss.next_token_loss(model, {"input_ids": ids, "labels": labels})
    p, q = (m(input_ids=ids).logits[:, :-1].double().softmax(-1) for m in (model, teacher))
    is_target = labels[:, 1:] != -100
    nll = -p.gather(2, ids[:, 1:, None])[..., 0].log()[is_target].sum()
    kl = (q * (q.log() - p.log())).sum(-1)[is_target].sum()
    assert num_targets == is_target.sum()
    assert extras["kl"].item() == pytest.approx(kl.item(), rel=1e-5)  # sums of float32
    assert got.item() == pytest.approx((0.5 * nll + 0.5 * kl).item(), rel=1e-5)

    loss.teacher.cache_clear()  # a new process would load it anew, and must draw no random number for it
    assert_same_run(resume_from_step_3(main, arguments, tmp_path / "run"), tmp_path / "run")


def test_another_optimizer_trains_and_its_state_is_resumed(change, text_file, tmp_path):
    main = change("optimizer")
    arguments = [*TINY, *SHORT, f"--train_file={text_file}"]
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 0
    assert "- optimizer: RAdam, " in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert_same_run(resume_from_step_3(main, arguments, tmp_path / "run"), tmp_path / "run")


def test_the_metric_is_exact_over_batches_and_processes(change, base, text_file, tmp_path):
    main = change("metric")
    arguments = [f"--model_name_or_path={base}", f"--validation_file={text_file}", "--block_size=32", "--eval_only"]
    arguments += ["--max_eval_samples=30"]
    launched = forked(tmp_path / "train_loop" / "main.py", *arguments, f"--output_dir={tmp_path}/two", processes=2)
    assert launched.returncode == 0 and "world size 2" in launched.stdout, launched.stderr
    found = [json.loads((tmp_path / "two" / "all_results.json").read_text())]
    for size in (1, 7):
        assert main([*arguments, f"--per_device_eval_batch_size={size}", f"--output_dir={tmp_path}/{size}"]) == 0
        found.append(json.loads((tmp_path / str(size) / "all_results.json").read_text()))

    from train_loop import model
    from train_loop.data import blocks as data
    from train_loop.data import rows
    from train_loop.settings.command_line import read_settings

    settings = read_settings([*arguments, "--output_dir=out"])
    eval_rows = rows.load_rows(settings)[1]
    blocks = data.load_split(eval_rows, model.load_tokenizer(settings, None), "validation", settings).blocks
    ids = torch.from_numpy(blocks.astype("int64"))
    with torch.no_grad():
        likeliest = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits[:, :-1].argmax(-1)
    num_right = (likeliest == ids[:, 1:]).sum().item()
    assert num_right > 50 and num_right != (likeliest == ids[:, :-1]).sum() and len(likeliest.unique()) > 10
    assert [result["eval_accuracy"] for result in found] == [num_right / (30 * 31)] * 3


def test_rows_of_a_database_train_as_the_same_rows_of_a_file(change, text_file, tmp_path):
    main = change("rows_from_sqlite")
    texts = text_file.read_text().split("\n\n")
    with sqlite3.connect(tmp_path / "posts.sqlite") as database:
        database.execute("CREATE TABLE posts (id INTEGER PRIMARY KEY, body TEXT)")
        database.executemany("INSERT INTO posts (body) VALUES (?)", [(text,) for text in texts])
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert main([*TINY, *SHORT, "--dataset_name=posts.sqlite", f"--output_dir={tmp_path}/database"]) == 0
    assert main([*TINY, *SHORT, "--train_file=posts.jsonl", f"--output_dir={tmp_path}/file"]) == 0
    assert_same_run(tmp_path / "database", tmp_path / "file")
