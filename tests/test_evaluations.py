"""When the loop evaluates and logs, what a line holds, and what happens where a loss is not finite."""

import inspect
import json
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import BLOCK, TINY, largest_difference, make_model, train

from train_loop import loop
from train_loop.checkpoint.durable import steps_in
from train_loop.data.blocks import Split
from train_loop.errors import UserError
from train_loop.evaluate import evaluate
from train_loop.loss import count_targets
from train_loop.main import main
from train_loop.report.metrics import Metrics
from train_loop.settings.command_line import read_settings
from train_loop.settings.settings import Settings


def lines_in(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluated_steps(folder):
    return [line["step"] for line in lines_in(folder) if "eval_loss" in line]


def test_the_loop_takes_at_most_eight_arguments_by_keyword_each_with_its_type():
    parameters = inspect.signature(loop.train).parameters.values()
    assert len(parameters) <= 8
    assert all(p.kind is p.KEYWORD_ONLY and p.annotation is not p.empty for p in parameters)


def with_a_broken_row(blocks):
    """(model, training blocks, validation blocks): the embedding of a token that only the validation has is NaN."""
    model = make_model("llama")
    token = blocks[0, 0]
    train_blocks = np.where(blocks == token, (token + 1) % 97, blocks)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    eval_blocks = train_blocks[:2].copy()
    eval_blocks[0, 3] = token
    return model, train_blocks, eval_blocks


def test_an_evaluation_that_is_not_finite_stops_the_run_before_the_first_step(blocks, tmp_path):
    model, train_blocks, eval_blocks = with_a_broken_row(blocks)
    with pytest.raises(UserError) as error:
        train(model, train_blocks, eval_blocks, tmp_path / "run")
    assert re.match(
        r"after step 0: eval_loss is nan, which is not finite; .* there is no checkpoint yet", str(error.value)
    )
    assert "not updated yet: check loss.py" in str(error.value) and "learning_rate" not in str(error.value)


def test_no_checkpoint_is_written_after_an_evaluation_that_is_not_finite(blocks, tmp_path):
    """The training losses are finite: the token is not in them."""
    model, train_blocks, eval_blocks = with_a_broken_row(blocks)
    options = {"num_train_epochs": 2.0, "eval_steps": 4, "eval_delay": 4.0, "checkpointing_steps": "2"}
    with pytest.raises(UserError, match=r"after step 4: eval_loss is nan.*step-000002\. Try a lower learning_rate"):
        train(model, train_blocks, eval_blocks, tmp_path / "run", **options)
    assert steps_in(tmp_path / "run" / "checkpoints") == [2]
    assert [line["step"] for line in lines_in(tmp_path / "run")] == [1, 2, 3, 4]


def test_named_splits_are_evaluated_beside_the_first_which_alone_decides(blocks, tmp_path):
    """A split that gets worse while the first gets better: tokens that never follow each other in training."""
    other = np.random.default_rng(5).integers(97, size=(3, BLOCK), dtype=np.int32)
    splits = {"validation": blocks[:4], "noise": other}
    options = {"num_train_epochs": 4.0, "learning_rate": 1e-2, "early_stopping_patience": 1, "eval_steps": 3}
    model = make_model()
    _, evaluation, weights = train(model, blocks, splits, tmp_path / "two", **options)
    found = [line for line in lines_in(tmp_path / "two") if "eval_loss" in line]
    assert [line["step"] for line in found] == [0, 3, 6, 9, 12]
    assert found[-1]["eval_noise_loss"] > found[0]["eval_noise_loss"] and found[-1]["eval_loss"] < found[0]["eval_loss"]
    assert found[-1]["eval_noise_tokens"] == 3 * (BLOCK - 1) and found[-1]["eval_tokens"] == 4 * (BLOCK - 1)
    settings, accelerator = Settings(), Accelerator(cpu=True)
    alone = evaluate(model, Split("noise", other), settings, accelerator)
    assert (
        alone["eval_loss"] == evaluation["eval_noise_loss"]
        and alone["perplexity"] == evaluation["eval_noise_perplexity"]
    )
    # the second has no effect on the run
    _, without, same = train(make_model(), blocks, blocks[:4], tmp_path / "one", **options)
    assert largest_difference(weights, same) == 0
    assert without == {name: value for name, value in evaluation.items() if "noise" not in name}


def test_the_first_evaluation_waits_for_eval_delay_in_epochs_or_steps_and_the_last_is_made(blocks, tmp_path):
    """22 blocks, 8 at a time: three steps an epoch."""
    for name, options in {
        "epochs": {"eval_delay": 2.0},
        "half": {"eval_delay": 1.5},
        "steps": {"eval_delay": 5, "eval_steps": 2},
        "end": {"eval_delay": 11, "eval_steps": 4},
    }.items():
        train(make_model(), blocks, blocks[:2], tmp_path / name, num_train_epochs=11 / 3, **options)
    assert evaluated_steps(tmp_path / "epochs") == [6, 9, 11] == evaluated_steps(tmp_path / "half")
    assert evaluated_steps(tmp_path / "steps") == [6, 8, 10, 11]
    assert evaluated_steps(tmp_path / "end") == [11]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--eval_delay=-1"], "--eval_delay is '-1', but must be a number, at least 0"),
        (["--eval_delay=3.5"], "eval_delay is 3.5 epochs, but the run has num_train_epochs 3"),
        (["--logging_first_step=2"], "--logging_first_step is '2', but must be true or false"),
    ],
)
def test_a_delay_beyond_the_run_is_one_sentence(words, said):
    with pytest.raises(ValueError) as error:
        read_settings(["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o", *words])
    assert str(error.value).endswith(said)


def test_a_delay_of_more_steps_than_the_run_has_is_refused_before_it_begins(text_file, tmp_path, capsys):
    arguments = [*TINY, f"--train_file={text_file}", "--num_train_epochs=1", "--eval_steps=2", "--eval_delay=14"]
    assert main([*arguments, f"--output_dir={tmp_path}/run"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: eval_delay 14 is 14 steps, but the run has 13 steps"
    assert not (tmp_path / "run").exists()


def test_the_first_step_is_logged_on_request(blocks, tmp_path):
    options = {"num_train_epochs": 2.0, "logging_steps": 4}
    for name, asked in (("with", True), ("without", False)):
        train(make_model(), blocks, blocks[:2], tmp_path / name, logging_first_step=asked, **options)
    logged = [[line["step"] for line in lines_in(tmp_path / n) if "loss" in line] for n in ("with", "without")]
    assert logged == [[1, 3, 4, 6], [3, 4, 6]]


def step_of(metrics, step, **values):
    sums = {"loss": torch.tensor(6.0)}
    values = {"learning_rate": 1e-3, "grad_norm": torch.tensor(2.0), **values}
    metrics.count_step(step, step / 3, sums, torch.tensor(4), values)


def test_a_line_of_metrics_holds_your_own_numbers_and_tensors(tmp_path):
    """The values are those of the last step. A tensor is read when the line is written; a checkpoint can hold it."""
    metrics = Metrics(tmp_path, 9, is_main=True)
    weight = torch.nn.Parameter(torch.ones(3))
    step_of(metrics, 1, weight_norm=weight.norm(), temperature=3)
    assert isinstance(metrics.latest["weight_norm"], torch.Tensor) and not metrics.latest["weight_norm"].requires_grad
    step_of(metrics, 2, weight_norm=2 * weight.norm(), temperature=0.5)
    state = json.loads(json.dumps(metrics.state_dict()))
    assert state["latest"]["weight_norm"] == pytest.approx(2 * 3**0.5)
    metrics.log_training()
    (line,) = lines_in(tmp_path)
    assert list(line) == [
        *("step", "epoch", "loss", "learning_rate", "grad_norm", "weight_norm", "temperature"),
        *("tokens_seen", "tokens_per_second"),
    ]
    assert (line["step"], line["epoch"], line["loss"], line["temperature"]) == (2, 0.666667, 1.5, 0.5)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("norms", torch.ones(2), "norms must be a number or a tensor of one number"),
        ("note", "text", "note must be a number or a tensor of one number"),
        ("loss", 1.0, "a line of metrics already has loss: give the value a different name"),
        ("tokens_seen", 1.0, "a line of metrics already has tokens_seen"),
    ],
)
def test_a_value_that_a_line_cannot_hold_is_an_error_at_the_first_step(name, value, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        step_of(Metrics(tmp_path, 9, is_main=True), 1, **{name: value})


def test_a_second_pass_over_a_window_is_a_second_call(blocks):
    """The gradients of the second call are added to those of the first. The returned sums are those of each call."""
    accelerator, model = Accelerator(cpu=True), make_model()
    ids = torch.from_numpy(blocks[:6].astype(np.int64)).reshape(3, 2, BLOCK)
    tensors, num_targets = {"input_ids": ids, "labels": ids}, count_targets(ids)
    first = loop.forward_backward(model, tensors, num_targets, accelerator, named={})
    once = [p.grad.clone() for p in model.parameters()]
    again = loop.forward_backward(model, tensors, num_targets, accelerator, named={})
    assert torch.equal(first["loss"], again["loss"]) and not first["loss"].requires_grad
    for gradient, parameter in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
