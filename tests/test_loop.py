"""The numbers of the loop, against the real Trainer and against itself cut another way."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import transformers
from conftest import BLOCK, largest_difference, make_model, train
from transformers import Trainer, TrainingArguments

from train_loop.data.blocks import IGNORED, Windows, block_order, load_windows
from train_loop.loss import count_targets, next_token_loss


class RecordingTrainer(Trainer):
    """The real Trainer, with the order of rows handed to it and each step's loss kept unrounded."""

    def __init__(self, *arguments, order, **options):
        super().__init__(*arguments, **options)
        self.order, self.losses = order, []

    def _get_train_sampler(self, *arguments):
        return self.order

    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        self.losses.append(loss.item())
        return loss


EACH = list(itertools.product(["gpt2", "llama"], [0.01, 0.1], [1, 4], ["one batch", "shuffled"]))
ALWAYS = [EACH[i] for i in (0b0000, 0b0111, 0b1011, 0b1101, 0b1110)]  # any two values of two columns are met in one


@pytest.mark.parametrize(
    "model_type, weight_decay, accumulation, order",
    [case if case in ALWAYS else pytest.param(*case, marks=pytest.mark.slow) for case in EACH],
)
def test_thirty_steps_equal_trainers(model_type, weight_decay, accumulation, order, blocks, tmp_path):
    """Tolerances: float32 rounding. Losses are nats per target token in both."""
    blocks = blocks[:16]
    per_step = 16 if order == "one batch" else 8
    options = {
        "per_device_train_batch_size": per_step // accumulation,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-3,
        "weight_decay": weight_decay,
        "max_grad_norm": 0.5,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
    }
    model = make_model(model_type)
    lines, evaluation, ours = train(model, blocks, blocks[:5], tmp_path / "run", max_train_steps=30, **options)

    num_epochs = 30 * per_step // 16
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in blocks]
    reference = make_model(model_type)
    # transformers 5.23 takes GPT-2's class for one whose loss does not shift, and would divide by the labels before the
    # shift: its losses and gradients would be 15/16 of the true ones here
    reference.loss_type = "ForCausalLM"
    trainer = RecordingTrainer(
        model=reference,
        args=TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            max_steps=30,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            lr_scheduler_type="linear",
            **options,
        ),
        # one long epoch of rows in our order, so that the Trainer's own epochs play no part
        train_dataset=[rows[i] for epoch in range(num_epochs) for i in block_order(blocks, 42, epoch)],
        eval_dataset=rows[:5],
        data_collator=transformers.default_data_collator,
        order=list(range(num_epochs * 16)),
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    losses = np.array(trainer.losses).reshape(30, accumulation).sum(axis=1)
    np.testing.assert_allclose(
        [line["loss"] for line in lines],
        losses,
        rtol=1e-5,
        err_msg="the losses are not those of transformers.Trainer. The first one already: look at the objective and at "
        "what it is divided by. A later one: at what a step does to the weights",
    )
    np.testing.assert_allclose(
        [line["grad_norm"] for line in lines],
        [entry["grad_norm"] for entry in logged],
        rtol=1e-4,
        err_msg="the gradient norms are not those of transformers.Trainer: look at forward_backward and zero_grad",
    )
    assert min(line["grad_norm"] for line in lines) > 0.5, "clipping was not active in every step"
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * (1 - step / 30) for step in range(30)]), (
        "the learning rate does not fall in a line from step to step: scheduler.step() belongs once into each step"
    )
    assert largest_difference(ours, reference.state_dict()) < 1e-5, (
        "the losses are those of transformers.Trainer, but the last weights are not: look at the optimizer's groups"
    )
    assert evaluation["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5), (
        "the validation loss is not that of transformers.Trainer: look at evaluate.py"
    )


@pytest.mark.quick
@pytest.mark.parametrize("micro_batch, accumulation", [(1, 8), (2, 4), (4, 2), (3, 3)])
def test_accumulating_micro_batches_equals_one_big_batch(micro_batch, accumulation, blocks, tmp_path):
    """22 blocks, 8 (or 9) to a step: the last step of each epoch is short. Tolerance: sums in another order."""
    whole = micro_batch * accumulation
    arguments = blocks, blocks[:3]
    options = {"num_train_epochs": 3.0}
    one = train(make_model(), *arguments, tmp_path / "one", per_device_train_batch_size=whole, **options)
    many = train(
        make_model(),
        *arguments,
        tmp_path / "many",
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    assert len(one[0]) == len(many[0]) == 9
    for a, b in zip(one[0], many[0], strict=True):
        assert b["tokens_seen"] == a["tokens_seen"]
        said = f"step {a['step']}: {accumulation} micro-batches of {micro_batch} blocks are not one of {whole}"
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), f"{said}: the loss must be a sum over all of them"
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4), f"{said}: their gradients must add up"
    assert one[0][-1]["tokens_seen"] == 3 * 22 * (BLOCK - 1)
    assert largest_difference(one[2], many[2]) < 1e-5


@pytest.mark.quick
def test_micro_batches_with_few_targets_weigh_by_their_targets(blocks, tmp_path, monkeypatch):
    """Labels that are -100 in some places, more of them in some blocks than in others."""
    plain = Windows.__getitem__

    def ragged(self, window):
        batch = plain(self, window)
        # how many labels go is a function of the block alone, so that each way of cutting sees the same
        keep = batch["input_ids"][..., :1] % BLOCK
        return batch | {"labels": batch["labels"].masked_fill(torch.arange(BLOCK) > keep, IGNORED)}

    monkeypatch.setattr(Windows, "__getitem__", ragged)
    one = train(make_model(), blocks, blocks[:3], tmp_path / "one", per_device_train_batch_size=22)
    many = train(
        make_model(),
        blocks,
        blocks[:3],
        tmp_path / "many",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=22,
    )
    assert many[0][0]["tokens_seen"] == one[0][0]["tokens_seen"] < 22 * (BLOCK - 1)
    assert many[0][0]["loss"] == pytest.approx(one[0][0]["loss"], rel=1e-6), (
        "the loss of a step must be the sum over all its targets, divided by their number: not a mean of means"
    )
    assert many[0][0]["grad_norm"] == pytest.approx(one[0][0]["grad_norm"], rel=1e-5)


@pytest.mark.quick
def test_evaluating_every_step_or_never_gives_the_same_weights_bit_for_bit(blocks, tmp_path):
    often = train(make_model(dropout=True), blocks, blocks[:5], tmp_path / "often", eval_steps=1)
    never = train(make_model(dropout=True), blocks, blocks[:5], tmp_path / "never", eval_steps=1000)
    assert [line["loss"] for line in often[0]] == [line["loss"] for line in never[0]], "evaluation changed training"
    assert largest_difference(often[2], never[2]) == 0, "evaluation changed the weights"


@pytest.mark.quick
def test_a_loss_that_is_not_finite_stops_before_the_step(blocks, tmp_path):
    model = make_model()
    settings = {"max_train_steps": 5, "learning_rate": 1e38, "max_grad_norm": 0.0}
    with pytest.raises(ValueError, match=r"step [23]: the loss"):
        train(model, blocks, blocks[:2], tmp_path / "run", **settings)
    model.zero_grad()  # the step that was not taken left its gradients
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"step 1: the loss .* not updated yet: check loss\.py, the training"):
        train(model, blocks, blocks[:2], tmp_path / "again", max_train_steps=5, eval_delay=1.0)
    after = model.state_dict()
    assert all(torch.equal(before[name].nan_to_num(7.0), after[name].nan_to_num(7.0)) for name in before)


@pytest.mark.quick
def test_logged_loss_is_the_token_weighted_mean_since_the_line_before(blocks, tmp_path):
    each, _, _ = train(make_model(), blocks, blocks[:2], tmp_path / "each", num_train_epochs=4.0)
    some, _, _ = train(make_model(), blocks, blocks[:2], tmp_path / "some", num_train_epochs=4.0, logging_steps=5)
    logged = [line["step"] for line in some]
    assert logged == [3, 5, 6, 9, 10, 12], "a line of training belongs to every fifth step, and to the end of an epoch"
    nats, seen, last = 0.0, 0, 0
    for line in each:
        nats += line["loss"] * (line["tokens_seen"] - seen)
        seen = line["tokens_seen"]
        if some and line["step"] == some[0]["step"]:
            assert some[0]["loss"] == pytest.approx(nats / (seen - last), rel=1e-6)
            nats, last = 0.0, seen
            some.pop(0)
    assert not some


@pytest.mark.quick
def test_lines_of_training_and_evaluation_say_how_much_of_the_epochs_is_done(blocks, tmp_path):
    """22 blocks, 8 at a time: three steps an epoch."""
    train(make_model(), blocks, blocks[:2], tmp_path / "run", num_train_epochs=2.0, eval_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4, 6]
    assert [line["epoch"] for line in lines] == [round(line["step"] / 3, 6) for line in lines], (
        "the position does not move on with the steps: position.move_to(window.end) belongs into each step"
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * t / 4)) for t in (1, 2, 3))]),
        ("constant", [1.0] * 6),
        ("constant_with_warmup", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_learning_rate_is_a_function_of_the_optimizer_step(schedule, expected, accumulation, blocks, tmp_path):
    lines, _, _ = train(
        make_model(),
        blocks,
        blocks[:2],
        tmp_path / "run",
        max_train_steps=6,
        learning_rate=1e-3,
        lr_scheduler_type=schedule,
        num_warmup_steps=2,
        gradient_accumulation_steps=accumulation,
    )
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * factor for factor in expected]), (
        f"the learning rates of the steps are not those of the schedule {schedule} with 2 steps of warm-up: "
        "scheduler.step() belongs once into each optimizer step, after optimizer.step()"
    )


@pytest.mark.quick
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 22])
@pytest.mark.parametrize(
    "world_size, micro_batch, accumulation", [(1, 6, 1), (2, 3, 1), (3, 2, 1), (1, 2, 3), (3, 1, 2)]
)
def test_each_block_is_seen_once_an_epoch_however_the_batch_is_spread(
    num_blocks, world_size, micro_batch, accumulation
):
    """And each optimizer step of six blocks holds the same blocks, on any number of processes."""
    blocks = np.arange(num_blocks, dtype=np.int32)[:, None].repeat(4, axis=1)
    order = block_order(np.zeros(num_blocks), 42, 3)
    ranks = [
        list(load_windows(Windows(blocks, order, micro_batch, accumulation, world_size, rank)))
        for rank in range(world_size)
    ]
    assert {len(windows) for windows in ranks} == {math.ceil(num_blocks / 6)}
    for step, windows in enumerate(zip(*ranks, strict=True)):
        assert len({window["labels"].shape for window in windows}) == 1
        seen = torch.cat([window["labels"][..., 1].flatten() for window in windows])
        assert sorted(seen[seen != IGNORED].tolist()) == sorted(order[step * 6 : step * 6 + 6])


@pytest.mark.quick
def test_windows_can_begin_anywhere(blocks):
    windows = Windows(blocks, block_order(blocks, 1, 0), 2, 2)
    whole = list(load_windows(windows))
    rest = list(load_windows(windows, first=3))
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(whole[3:], rest, strict=True))


@pytest.mark.quick
def test_loss_counts_the_targets_after_the_shift(blocks):
    labels = torch.from_numpy(blocks[:2].astype(np.int64))
    labels[0, :5] = IGNORED
    assert count_targets(labels) == 2 * (BLOCK - 1) - 4
    model = make_model().eval()
    input_ids = torch.from_numpy(blocks[:2].astype(np.int64))
    nll_sum, num_targets, extras = next_token_loss(model, {"input_ids": input_ids, "labels": labels})
    assert num_targets == count_targets(labels) and extras == {}
    # the model's own loss is the mean over the same targets
    own = model(input_ids, labels=labels).loss.item()
    assert (nll_sum / num_targets).item() == pytest.approx(own, rel=1e-6), (
        "next_token_loss, divided by the number of targets, is not the model's own loss: it must be a sum over targets"
    )


def smoothed(logits, targets, **of_rows):
    """An objective of one's own: label smoothing, with the plain loss logged beside it."""
    is_target, log_p = targets != IGNORED, logits.log_softmax(-1)
    plain = -log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0][is_target].sum()
    return 0.9 * plain - 0.1 * log_p.mean(-1)[is_target].sum(), {"plain_loss": plain}


def with_z_loss(logits, targets, **of_rows):
    """Another: the squared log of the softmax's denominator is added to the nats of each target."""
    nll = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    z = logits.logsumexp(-1)[targets != IGNORED].square().sum()
    return nll + 1e-2 * z, {"z_loss": z}


@pytest.mark.parametrize("objective", [smoothed, with_z_loss])
def test_your_own_objective_is_normalised_and_logged_in_training_and_evaluation(
    objective, blocks, tmp_path, monkeypatch
):
    """How a step is cut into micro-batches has no effect. Evaluation reports the objective beside the plain loss."""
    plain_lines, _, plain_weights = train(make_model(), blocks, blocks[:3], tmp_path / "plain")
    monkeypatch.setattr("train_loop.loss.objective", objective)
    one = train(make_model(), blocks, blocks[:3], tmp_path / "one", per_device_train_batch_size=8)
    many = train(
        make_model(),
        blocks,
        blocks[:3],
        tmp_path / "many",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    (extra,) = one[0][0].keys() - plain_lines[0].keys()
    assert extra in ("plain_loss", "z_loss") and {f"eval_{extra}", "eval_objective"} <= one[1].keys()
    for a, b in zip(one[0], many[0], strict=True):
        assert (b["loss"], b[extra]) == pytest.approx((a["loss"], a[extra]), rel=1e-5)
    assert largest_difference(one[2], many[2]) < 1e-5
    assert largest_difference(one[2], plain_weights) > 1e-4, "the objective changed nothing"
    if objective is smoothed:  # before the first step both see the same weights
        assert one[0][0]["plain_loss"] == pytest.approx(plain_lines[0]["loss"], rel=1e-6)
        assert one[0][0]["loss"] != pytest.approx(plain_lines[0]["loss"], rel=1e-4)
    else:
        assert one[0][0]["loss"] == pytest.approx(plain_lines[0]["loss"] + 1e-2 * one[0][0]["z_loss"], rel=1e-6)
