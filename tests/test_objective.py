"""What stands in `loss.objective` is what is trained, shown on a trained model, and validation is plain."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import NO_DROPOUT, TINY, TINY_CONFIGS, VOCAB, lines_of
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop import head, loss
from train_loop.cross_entropy import cross_entropy
from train_loop.data.blocks import IGNORED, Split
from train_loop.loss import next_token_loss, plain_next_token_loss
from train_loop.main import main
from train_loop.settings.settings import Settings
from train_loop.trial import loss_check


@pytest.fixture(scope="module")
def trained(blocks):
    """A small GPT-2 that gives the right token of most pairs a high probability, and a batch of such pairs."""
    torch.manual_seed(1)
    config = AutoConfig.for_model("gpt2", vocab_size=VOCAB, **TINY_CONFIGS["gpt2"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.from_numpy(blocks[:12].astype("int64"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        nats = model(ids, labels=ids).loss
        nats.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert nats < 0.5
    return model, {"input_ids": ids, "labels": ids.masked_fill(ids % 7 == 0, IGNORED)}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(head.ROWS_PER_CHUNK, "cpu", 8)


def focal(logits, targets, **of_rows):
    nats = cross_entropy(logits, targets, inplace=True)
    return ((1 - torch.exp(-nats)) ** 2 * nats).sum(), {"plain": nats.sum()}


def late(logits, targets, positions, **of_rows):
    nats = cross_entropy(logits, targets, inplace=True)
    return (nats * torch.where(positions >= 8, 5.0, 1.0)).sum(), {}


def ramped(logits, targets, step=0, **of_rows):
    z = logits.logsumexp(-1)[targets != IGNORED].square().sum()
    return cross_entropy(logits, targets).sum() + min(step / 100, 1) * 0.1 * z, {"z": z}


def weighted(logits, targets, target_weight, **of_rows):
    return (cross_entropy(logits, targets, inplace=True) * target_weight).sum(), {}


def unlikelihood(logits, targets, **of_rows):
    """Token 3 is made unlikely."""
    p = logits.softmax(-1)[:, 3]
    return cross_entropy(logits, targets, inplace=False).sum() - torch.log1p(-p)[targets != IGNORED].sum(), {}


WEIGHT = torch.rand(12, 16, generator=torch.Generator().manual_seed(0))


def through_full_logits(name, model, batch, step):
    """The same, written down for log-probabilities [B, T - 1, V] of all rows, in float64."""
    labels = batch["labels"][:, 1:]
    is_target = labels != IGNORED
    logits = model(batch["input_ids"]).logits[:, :-1].double()
    nats = -logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    per_row = {
        "focal": lambda: (1 - torch.exp(-nats)) ** 2 * nats,
        "late": lambda: nats * torch.where(torch.arange(15) >= 8, 5.0, 1.0),
        "ramped": lambda: nats + step / 100 * 0.1 * logits.logsumexp(-1).square(),
        "weighted": lambda: nats * WEIGHT[:, 1:],
        "unlikelihood": lambda: nats - torch.log1p(-logits.softmax(-1)[..., 3]),
    }[name]()
    return per_row[is_target].sum()


def gradients_of(total, model):
    return torch.autograd.grad(total, list(model.parameters()))


@pytest.mark.parametrize("in_chunks", [True, False])
@pytest.mark.parametrize("objective", [focal, late, ramped, weighted, unlikelihood])
def test_an_edited_objective_is_trained_as_autograd_through_full_logits_says(
    objective, in_chunks, trained, small_chunks, monkeypatch
):
    """Values and all gradients; and they are not those of plain cross entropy. Tolerance: float32 rounding."""
    model, batch = trained
    monkeypatch.setattr(loss, "objective", objective)
    monkeypatch.setattr(model, "inspected_head", head.Head(in_chunks), raising=False)
    batch = batch | {"step": 50, "target_weight": WEIGHT}
    total, _, extras = next_token_loss(model, batch)
    wanted = through_full_logits(objective.__name__, model, batch, step=50)
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    ours, theirs = gradients_of(total, model), gradients_of(wanted, model)
    plain_gradients = gradients_of(plain_next_token_loss(model, batch)[0], model)
    size = math.sqrt(sum(g.square().sum() for g in theirs))
    assert math.sqrt(sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True))) < 1e-4 * size
    assert math.sqrt(sum((a - b).square().sum() for a, b in zip(ours, plain_gradients, strict=True))) > 0.05 * size
    assert not any(value.requires_grad for value in extras.values())


def test_a_term_that_is_ramped_up_is_none_before_the_first_step(trained, monkeypatch):
    model, batch = trained
    monkeypatch.setattr(loss, "objective", ramped)
    losses = [next_token_loss(model, batch | {"step": step})[0].item() for step in (0, 10, 100, 200)]
    assert losses[0] == pytest.approx(plain_next_token_loss(model, batch)[0].item(), rel=1e-6)
    assert losses[0] < losses[1] < losses[2] == losses[3]


def test_evaluation_is_plain_whatever_is_trained_and_has_the_objective_beside_it(trained, small_chunks, monkeypatch):
    model, batch = trained
    plain, _, extras = plain_next_token_loss(model, batch)
    assert torch.equal(extras["objective"], plain.detach())
    wanted = through_full_logits("focal", model, batch, step=0)
    monkeypatch.setattr(loss, "objective", focal)
    with torch.no_grad():
        again, _, extras = plain_next_token_loss(model, batch)
    assert torch.equal(again, plain.detach()) and torch.equal(extras["plain"], again)
    assert extras["objective"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_run_trains_the_edited_objective_and_evaluates_plain_cross_entropy(text_file, tmp_path, monkeypatch):
    """eval_objective stands beside eval_loss only where it differs."""
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=3", "--logging_steps=1"]
    arguments += ["--checkpointing_steps=none", "--max_eval_samples=4"]
    assert main([*arguments, f"--output_dir={tmp_path}/plain"]) == 0
    monkeypatch.setattr(loss, "objective", focal)
    assert main([*arguments, f"--output_dir={tmp_path}/focal"]) == 0
    plain, edited = lines_of(tmp_path / "plain"), lines_of(tmp_path / "focal")
    assert plain[0]["eval_loss"] == edited[0]["eval_loss"] and "eval_objective" not in plain[0]
    assert edited[0]["eval_objective"] < edited[0]["eval_loss"] == edited[0]["eval_plain"]
    assert edited[-1]["perplexity"] == pytest.approx(math.exp(edited[-1]["eval_loss"]))
    first = edited[1]
    assert first["plain"] == pytest.approx(plain[1]["loss"], rel=1e-6) and first["loss"] < first["plain"]


def test_label_smoothing_is_torchs_in_training_and_none_in_evaluation(text_file, tmp_path):
    arguments = [*TINY, NO_DROPOUT, f"--train_file={text_file}", "--max_train_steps=1", "--logging_steps=1"]
    arguments += ["--checkpointing_steps=none", "--max_train_samples=8", "--max_eval_samples=4", "--learning_rate=0"]
    for factor in (0.0, 0.3):
        assert main([*arguments, f"--label_smoothing_factor={factor}", f"--output_dir={tmp_path}/{factor}"]) == 0
    plain, smoothed = lines_of(tmp_path / "0.0"), lines_of(tmp_path / "0.3")
    assert plain[0] == smoothed[0] and "eval_objective" not in smoothed[0]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "0.3")
    seen = []
    with pytest.MonkeyPatch.context() as patch:  # the one window of the run, of all eight blocks
        patch.setattr(
            "train_loop.loop.next_token_loss", lambda model, batch: seen.append(batch) or next_token_loss(model, batch)
        )
        assert main([*arguments, f"--output_dir={tmp_path}/seen"]) == 0
    labels = seen[0]["labels"]
    with torch.no_grad():
        logits = model(seen[0]["input_ids"]).logits[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.3)
    assert smoothed[1]["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    assert smoothed[1]["loss"] != pytest.approx(plain[1]["loss"], rel=2e-5)  # a new model is unsure of all tokens


# what is said of a loss before the first step


def check(model, blocks, **settings):
    return loss_check.check_loss(model, Split("blocks", blocks), Settings(**settings), Accelerator(cpu=True))


def test_the_unchanged_objective_gets_no_remark(trained, blocks):
    model, _ = trained
    model.train()
    random_state = torch.get_rng_state()
    assert check(model, blocks) == check(model, blocks, label_smoothing_factor=0.1) == []
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    model.eval()


MISTAKES = {
    "one value": (lambda nats: nats.sum(), TypeError, r"returned a Tensor. It must return 2: \(sum, extras\)"),
    "three values": (lambda nats: (nats.sum(), 3, {}), TypeError, "returned 3 values"),
    "a float": (lambda nats: (nats.sum().item(), {}), TypeError, "the sum is a float"),
    "no sum": (lambda nats: (nats, {}), ValueError, r"the sum has the shape \[15\]"),
    "detached": (lambda nats: (nats.detach().sum(), {}), ValueError, "the sum has no gradient"),
    "an extra that is a float": (lambda nats: (nats.sum(), {"z": 1.0}), TypeError, "the extra 'z' is a float"),
    "an extra for each row": (lambda nats: (nats.sum(), {"z": nats}), ValueError, r"'z' has the shape \[15\]"),
    "no dict": (lambda nats: (nats.sum(), nats.sum()), TypeError, "the extras are a Tensor"),
    "nan": (lambda nats: ((nats * 0).log().sum() * 0, {}), ValueError, "is nan, while its plain cross entropy is"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_objective_is_a_sentence_before_the_first_step(mistake, trained, blocks, monkeypatch):
    result, error, text = MISTAKES[mistake]
    monkeypatch.setattr(loss, "objective", lambda logits, targets, **of_rows: result(cross_entropy(logits, targets)))
    with pytest.raises(error, match=text) as caught:
        check(trained[0], blocks)
    assert mistake == "nan" or re.search(r"test_objective\.py:\d+\)", str(caught.value)), "file and line are named"


def test_a_mistake_in_next_token_loss_is_a_sentence_before_the_first_step(trained, blocks, monkeypatch):
    monkeypatch.setattr(loss_check, "next_token_loss", lambda *a: next_token_loss(*a)[:2])
    with pytest.raises(TypeError, match=r"returned 2 values\. It must return 3"):
        check(trained[0], blocks)

    def attached(model, batch):
        total, num_targets, _ = next_token_loss(model, batch)
        return total, num_targets, {"mine": total * 2}

    monkeypatch.setattr(loss_check, "next_token_loss", attached)
    with pytest.raises(ValueError, match=r"the extra 'mine' still has its gradient.*\.detach\(\)"):
        check(trained[0], blocks)


@pytest.mark.parametrize("first", [True, False])
def test_logits_that_are_used_beside_an_inplace_cross_entropy_are_an_error(first, trained, blocks, monkeypatch):
    """Without an error, the objective would silently use other numbers."""

    def objective(logits, targets, **of_rows):
        before = logits.logsumexp(-1).square().sum() if first else 0
        nats = cross_entropy(logits, targets, inplace=True).sum()
        return nats + (before if first else logits.logsumexp(-1).square().sum()), {}

    monkeypatch.setattr(loss, "objective", objective)
    with pytest.raises(RuntimeError if first else ValueError, match="inplace"):
        check(trained[0], blocks)


def test_an_exception_of_the_objective_is_shown_as_it_is(trained, blocks, monkeypatch):
    def objective(logits, targets, **of_rows):
        return {}["typo"]

    monkeypatch.setattr(loss, "objective", objective)
    with pytest.raises(KeyError, match="typo") as caught:
        next_token_loss(*trained)
    assert caught.traceback[-1].path.name == "test_objective.py"


def test_a_model_whose_own_loss_differs_is_named_with_both_numbers(trained, blocks):
    model, _ = trained
    ids = torch.from_numpy(blocks[:1].astype(np.int64))
    plain = model(ids, labels=ids).loss.item()
    own = model.loss_function
    try:
        for factor, is_said in ((1.0, False), (15 / 16, False), (1.01, True)):  # 15/16: divided by tokens, not targets
            model.loss_function = lambda *a, factor=factor, **o: own(*a, **o) * factor
            remark = " ".join(check(model, blocks))
            assert bool(remark) == is_said, (factor, remark)
        numbers = [float(number) for number in re.findall(r"\d\.\d{6}", remark)]
        assert numbers == pytest.approx([plain * 1.01, plain], abs=2e-6)
    finally:
        model.loss_function = own


# a mixture of experts

MIXTRAL = {**TINY_CONFIGS["llama"], "num_local_experts": 4, "router_aux_loss_coef": 10.0, "num_hidden_layers": 1}


def test_a_mixtures_auxiliary_loss_is_trained_if_its_config_asks_for_it_and_never_evaluated(small_chunks, blocks):
    """Value and gradients are those of the model's own loss, which Trainer minimises. Tolerance: float32 rounding."""
    ids = torch.from_numpy(blocks[:3].astype(np.int64))
    batch, plain = {"input_ids": ids, "labels": ids}, []
    for asks in (False, True):
        torch.manual_seed(1)
        config = AutoConfig.for_model("mixtral", vocab_size=VOCAB, **MIXTRAL, output_router_logits=asks)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        total, num_targets, extras = next_token_loss(model, batch)
        own = model(**batch)
        torch.testing.assert_close(total / num_targets, own.loss, rtol=1e-5, atol=0)
        for ours, theirs in zip(gradients_of(total / num_targets, model), gradients_of(own.loss, model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        plain.append(plain_next_token_loss(model, batch)[0].item())
        assert extras.keys() == ({"aux_loss"} if asks else set())
        assert check(model, blocks) == []
    assert extras["aux_loss"].item() / num_targets == pytest.approx(own.aux_loss.item(), rel=1e-6)
    assert plain[0] == plain[1] and total.item() > plain[1] + 9 * extras["aux_loss"].item()


def test_a_run_of_a_mixture_logs_its_auxiliary_loss_and_keeps_it_out_of_validation(text_file, tmp_path):
    sizes = ",".join(f"{name}={value}" for name, value in MIXTRAL.items())
    arguments = [*TINY, f"--train_file={text_file}", "--model_type=mixtral", "--max_train_steps=1", "--logging_steps=1"]
    arguments += ["--checkpointing_steps=none", "--max_eval_samples=4", "--learning_rate=0"]
    lines = {}
    for asks in ("true", "false"):
        overrides = f"--config_overrides={sizes},output_router_logits={asks}"
        assert main([*arguments, overrides, f"--output_dir={tmp_path}/{asks}"]) == 0
        lines[asks] = lines_of(tmp_path / asks)
    with_it, without = lines["true"][1], lines["false"][1]
    assert 1.9 < with_it["aux_loss"] < 2.5 and "aux_loss" not in without
    assert with_it["loss"] == pytest.approx(without["loss"] + 10 * with_it["aux_loss"], rel=1e-5)
    assert with_it["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-3)
    assert lines["true"][0] == lines["false"][0] and "eval_aux_loss" not in lines["true"][0]
