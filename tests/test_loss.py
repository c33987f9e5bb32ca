"""The loss without logits against the plain one, and what comes with it: compiled, and held back on a device."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import TINY_CONFIGS, VOCAB, largest_difference
from test_loop import make_model, train
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop import loss
from train_loop.checkpoint.checkpoint import Checkpoints
from train_loop.data.blocks import IGNORED
from train_loop.finite import FiniteGuard
from train_loop.loss import LinearCrossEntropy, next_token_loss, put_loss_in_head
from train_loop.settings.settings import Settings


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 rows, so that a few blocks are several chunks and the last one is short."""
    monkeypatch.setitem(loss.ROWS_PER_CHUNK, "cpu", 8)


def plain(hidden, weight, bias, targets):
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def in_head(hidden, weight, bias, targets):
    return LinearCrossEntropy.apply(hidden, weight, bias, targets, torch.is_grad_enabled())


def loss_and_gradients(function, with_bias, dtype=None, scale=0.37):
    """On 21 rows, some without a target; the loss is scaled as the loop scales it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(21, 16, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, 16, generator=generator).requires_grad_()
    bias = torch.randn(VOCAB, generator=generator).requires_grad_() if with_bias else None
    targets = torch.randint(VOCAB, (21,), generator=generator)
    targets[[0, 5, 20]] = IGNORED
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        nll_sum = function(hidden, weight, bias, targets)
    (nll_sum * scale).backward()
    return [nll_sum.detach(), *(t.grad for t in (hidden, weight, bias) if t is not None)]


@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_without_logits_equal_the_plain_ones(with_bias, small_chunks):
    """Tolerance: float32 rounding."""
    for ours, theirs in zip(*(loss_and_gradients(f, with_bias) for f in (in_head, plain)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_sum_is_float32_and_as_near_to_the_truth_as_the_plain_one(dtype, small_chunks):
    exact = loss_and_gradients(plain, with_bias=True)
    ours, theirs = (loss_and_gradients(f, with_bias=True, dtype=dtype) for f in (in_head, plain))
    assert ours[0].dtype == torch.float32
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        error, allowed = ((x - truth).norm() / truth.norm() for x in (a, b))
        assert error < max(1.5 * allowed, 1e-4)


def test_without_gradients_the_loss_is_the_same_number(small_chunks):
    with torch.no_grad():
        hidden, weight, targets = torch.randn(30, 16), torch.randn(VOCAB, 16), torch.randint(VOCAB, (30,))
        assert in_head(hidden, weight, None, targets) == pytest.approx(plain(hidden, weight, None, targets).item())


def test_a_frozen_head_passes_the_gradient_on():
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(VOCAB, 16)
    targets = torch.randint(VOCAB, (9,))
    (ours,), (theirs,) = (torch.autograd.grad(f(hidden, weight, None, targets), hidden) for f in (in_head, plain))
    torch.testing.assert_close(ours, theirs)


def test_a_second_backward_pass_is_an_error():
    nll_sum = in_head(torch.randn(9, 16, requires_grad=True), torch.randn(VOCAB, 16), None, torch.randint(VOCAB, (9,)))
    nll_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        nll_sum.backward()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", [*TINY_CONFIGS, "phi"])
def test_training_without_logits_equals_training_with_them(model_type, tied, blocks, tmp_path, small_chunks):
    """Four families, and phi, whose head has a bias. Tolerance: float32 rounding over nine steps."""
    sizes = TINY_CONFIGS[model_type if model_type in TINY_CONFIGS else "llama"]

    def make():
        torch.manual_seed(1)
        config = AutoConfig.for_model(model_type, vocab_size=VOCAB, tie_word_embeddings=tied, pad_token_id=0, **sizes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    options = {"num_train_epochs": 3.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    with_logits = train(make(), blocks, blocks[:5], tmp_path / "plain", **options)
    model = make()
    assert put_loss_in_head(model)
    without = train(model, blocks, blocks[:5], tmp_path / "head", **options)
    assert [a["loss"] for a in without[0]] == pytest.approx([b["loss"] for b in with_logits[0]], rel=1e-5)
    assert without[1]["eval_loss"] == pytest.approx(with_logits[1]["eval_loss"], rel=1e-5)
    assert largest_difference(without[2], with_logits[2]) < 2e-5


@pytest.mark.parametrize("model_type, change", [("gemma2", {"head_dim": 16}), ("cohere", {"logit_scale": 0.5})])
def test_a_model_that_changes_its_logits_is_noticed_and_trained_the_plain_way(model_type, change, blocks):
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, **TINY_CONFIGS["llama"], **change)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert not put_loss_in_head(model)
    ids = torch.from_numpy(blocks[:2].astype("int64"))
    nll_sum, num_targets, _ = next_token_loss(model, {"input_ids": ids, "labels": ids})
    assert (nll_sum / num_targets).item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_an_objective_changed_for_logits_alone_is_noticed_even_where_only_training_has_it(monkeypatch):
    """Where it would not be, the change would be without effect: the loss in the head stays what it was."""
    model = make_model()
    assert put_loss_in_head(model)
    plain = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *a, **o: plain(*a, **o) * (0.9 if torch.is_grad_enabled() else 1))
    assert not put_loss_in_head(model)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel())
        return result


def test_the_gradient_of_bfloat16_weights_is_summed_up_in_float32(small_chunks):
    """256 chunks with the same share of it each; in bfloat16 the sum would stay behind by a half. Tolerance: the head's
    products are rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 16, generator=generator).bfloat16().expand(2048, -1)
    weight = torch.randn(VOCAB, 16, generator=generator).bfloat16()
    gradients = []
    for function, dtype in ((in_head, torch.bfloat16), (plain, torch.float64)):
        own = weight.detach().to(dtype).requires_grad_()
        function(hidden.to(dtype), own, None, torch.full((2048,), 3)).backward()
        gradients.append(own.grad.double())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


def test_no_tensor_is_as_large_as_the_logits(small_chunks):
    torch.manual_seed(1)
    config = AutoConfig.for_model("gpt2", vocab_size=2000, **TINY_CONFIGS["gpt2"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = torch.randint(2000, (8, 64))
    sizes = []
    for model.loss_in_head in (False, True):
        with LargestTensor() as largest:
            next_token_loss(model, {"input_ids": ids, "labels": ids})[0].backward()
        sizes.append(largest.size)
    assert sizes[0] >= 8 * 63 * 2000 and sizes[1] < 70_000  # the head's weight has 64,000


def test_the_model_is_as_it_was_outside_the_loss(blocks):
    model = make_model().eval()
    ids = torch.from_numpy(blocks[:2].astype("int64"))
    before = model(ids).logits
    assert put_loss_in_head(model)
    next_token_loss(model, {"input_ids": ids, "labels": ids})
    assert torch.equal(model(ids).logits, before)


def test_where_the_host_does_not_wait_a_step_that_is_not_finite_is_held_back_on_the_device():
    weight = torch.nn.Parameter(torch.ones(3))
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW([weight], lr=0.1, fused=True))
    guard = FiniteGuard(optimizer, accelerator, Checkpoints(Settings(output_dir="unused"), accelerator))
    guard.waits = False  # as on a GPU

    def step(number, gradient):
        weight.grad = torch.full((3,), gradient)
        guard.check(number, torch.tensor(1.0), weight.grad.norm())
        optimizer.step()
        return weight.detach().clone()

    first = step(1, 1.0)
    guard.look()
    assert not torch.equal(first, torch.ones(3))
    assert torch.equal(step(2, float("nan")), first)
    assert torch.equal(step(3, 1.0), first), "a later step went on from weights that should have stayed"
    with pytest.raises(ValueError, match="step 2: the loss"):
        guard.look()


def test_a_compiled_model_is_compiled_in_its_first_epoch_alone(blocks, tmp_path):
    """Training with a short last batch, and evaluation with another batch size: no recompilation afterwards."""
    counter = CompileCounter()
    model = make_model()
    assert put_loss_in_head(model)
    model.base_model.compile(backend=counter)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 3}
    train(model, blocks, blocks[:5], tmp_path / "first", **options)
    num_compiled = counter.frame_count
    assert num_compiled > 0
    train(model, blocks, blocks[:5], tmp_path / "second", num_train_epochs=2.0, **options)
    assert counter.frame_count == num_compiled
