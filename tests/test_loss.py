"""The loss a chunk of rows at a time against the one through full logits, and what comes with it."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import TINY_CONFIGS, VOCAB
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop import head
from train_loop.checkpoint.checkpoint import Checkpoints
from train_loop.cross_entropy import cross_entropy
from train_loop.data.blocks import IGNORED
from train_loop.finite import FiniteGuard
from train_loop.head import head_of, sum_over_rows
from train_loop.loss import count_targets, next_token_loss, objective, plain_next_token_loss
from train_loop.settings.settings import Settings

pytestmark = pytest.mark.quick


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 rows, so that a few blocks are several chunks and the last one is short; two make a group."""
    monkeypatch.setitem(head.ROWS_PER_CHUNK, "cpu", 8)
    monkeypatch.setattr(head, "ROWS_PER_LOW_GROUP", 16)


def make_model(model_type="gpt2", **change):
    torch.manual_seed(1)
    sizes = TINY_CONFIGS[model_type if model_type in TINY_CONFIGS else "llama"]
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCAB, "pad_token_id": 0, **sizes, **change})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def some_batch(num_blocks=3, block_size=16):
    """Blocks of random tokens, with a few tokens that are no targets."""
    ids = torch.randint(VOCAB, (num_blocks, block_size), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, IGNORED)}


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Linear(torch.nn.Module):
    """A model that is nothing but its head: its hidden states are what it is given."""

    def __init__(self, hidden, weight, bias):
        super().__init__()
        self.hidden, self.lm_head = hidden, torch.nn.Linear(*reversed(weight.shape), bias=bias is not None)
        self.lm_head.weight = torch.nn.Parameter(weight)
        if bias is not None:
            self.lm_head.bias = torch.nn.Parameter(bias)
        self.inspected_head = head.Head(True)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache=False):
        output = type("Output", (), {})()
        output.logits = self.lm_head(self.hidden)
        return output


def loss_and_gradients(in_chunks, with_bias=True, dtype=None, function=objective):
    """On 3 blocks of 8 hidden states, which predict 21 tokens, some of them no targets; the loss is scaled as the loop
    scales it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 8, 16, generator=generator).requires_grad_()
    weight, bias = torch.randn(VOCAB, 16, generator=generator), torch.randn(VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (3, 8), generator=generator)
    labels[0, 1] = labels[0, 6] = labels[2, 7] = IGNORED
    model = Linear(hidden, weight, bias if with_bias else None)
    model.inspected_head = head.Head(in_chunks)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        [(total, _)], _ = sum_over_rows(model, {"input_ids": labels, "labels": labels}, function)
    (total * 0.37).backward()
    return [total.detach(), hidden.grad, *(p.grad for p in model.parameters())]


def torchs(logits, targets, **of_rows):
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"), {}


@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_in_chunks_equal_torchs_through_full_logits(with_bias, small_chunks):
    """Tolerance: float32 rounding."""
    wanted = loss_and_gradients(False, with_bias, function=torchs)
    for in_chunks in (False, True):
        for ours, theirs in zip(loss_and_gradients(in_chunks, with_bias), wanted, strict=True):
            said = f"the loss or a gradient {'in chunks' if in_chunks else 'through full logits'} is not torch's: "
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda why, said=said: said + why)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_sum_is_float32_and_as_near_to_the_truth_as_the_plain_one(dtype, small_chunks):
    exact = loss_and_gradients(False, function=torchs)
    ours, theirs = loss_and_gradients(True, dtype=dtype), loss_and_gradients(False, dtype=dtype, function=torchs)
    assert ours[0].dtype == torch.float32
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        error, allowed = ((x - truth).norm() / truth.norm() for x in (a, b))
        assert error < max(1.5 * allowed, 1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("inplace", [False, True])
def test_cross_entropy_is_torchs_for_each_row_whatever_gradient_comes_back(inplace, smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, weight = torch.randn(9, VOCAB, generator=generator), torch.randn(9, generator=generator)
    targets = torch.randint(VOCAB, (9,), generator=generator)
    targets[[0, 8]] = IGNORED
    found = []
    for ours in (True, False):
        own = logits.clone().requires_grad_()
        handed = own * 1  # as the logits that the driver hands out
        handed.padded = handed.detach()
        if ours:
            nats = cross_entropy(handed, targets, smoothing, inplace)
            assert bool(handed.isnan().all()) == inplace
        else:
            nats = F.cross_entropy(own, targets, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
        (nats * weight).sum().backward()
        found.append((nats.detach(), own.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_without_gradients_the_loss_is_the_same_number(small_chunks):
    model, batch = make_model(), some_batch()
    with torch.no_grad():
        without = next_token_loss(model, batch)[0]
    assert torch.equal(without, next_token_loss(model, batch)[0].detach())


def test_a_frozen_head_passes_the_gradient_on():
    found = []
    for frozen in (False, True):
        model = make_model("llama", tie_word_embeddings=False)
        model.lm_head.weight.requires_grad_(not frozen)
        found.append(gradients_of(next_token_loss(model, some_batch())[0], model))
    assert found[0].keys() - found[1].keys() == {"lm_head.weight"}
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())


def test_a_second_backward_pass_says_what_to_do():
    total = next_token_loss(make_model(), some_batch())[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call next_token_loss once more"):
        total.backward()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", [*TINY_CONFIGS, "phi"])
def test_the_gradients_of_a_model_are_those_of_its_own_loss(model_type, tied, small_chunks):
    """Four families, and phi, whose head has a bias. Tolerance: float32 rounding."""
    assert_trained_as_by_its_own_loss(make_model(model_type, tie_word_embeddings=tied))


@pytest.mark.parametrize(
    "model_type, change, found",
    [
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 0.2}, {"cap": 0.2}),
        ("cohere", {"logit_scale": 3.0}, {"scale": 3.0}),
        ("granite", {"logits_scaling": 0.25}, {"scale": 4.0}),
    ],
)
def test_a_model_with_a_cap_or_a_scale_on_its_logits_is_trained_in_chunks(model_type, change, found, small_chunks):
    """A cap so low that the small logits of a new model meet it. Tolerance: float32 rounding."""
    model = make_model(model_type, **change)
    assert head_of(model).in_chunks and not head_of(model).remarks
    for name, value in found.items():
        assert getattr(head_of(model), name) == pytest.approx(value, rel=1e-6)
    with_cap = assert_trained_as_by_its_own_loss(model)
    model.inspected_head = head.Head(True)  # as if it had neither
    assert abs(next_token_loss(model, some_batch())[0].item() / with_cap - 1) > 1e-3


def assert_trained_as_by_its_own_loss(model):
    """Value and gradients, and the value again in evaluation, where the model's logits are as before. Returns it."""
    batch = some_batch()
    before = model(batch["input_ids"]).logits
    total, num_targets, _ = next_token_loss(model, batch)
    own = model(**batch).loss
    torch.testing.assert_close(total / num_targets, own, rtol=1e-5, atol=0)
    ours, theirs = gradients_of(total / num_targets, model), gradients_of(own, model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert plain_next_token_loss(model, batch)[0].item() == pytest.approx(total.item(), rel=1e-6)
    assert torch.equal(model(batch["input_ids"]).logits, before)
    return total.item()


class Shifted(torch.nn.Module):
    """A model whose logits get something of their own behind the head."""

    def __init__(self, trained):
        super().__init__()
        self.inner, self.config, self.device = make_model(), make_model().config, torch.device("cpu")
        self.shift = torch.nn.Parameter(torch.zeros(VOCAB)) if trained else 3 * torch.arange(VOCAB).remainder(2)

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, labels=None, use_cache=False):
        output = self.inner(input_ids, use_cache=False)
        output.logits = output.logits + self.shift
        if labels is not None:
            output.loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_that_changes_its_logits_otherwise_is_trained_through_full_logits_and_says_so(trained, small_chunks):
    """Also where what it adds is 0 when training begins."""
    model = Shifted(trained).eval()
    (remark,) = head_of(model).remarks
    assert remark.startswith("from full logits: ") and not head_of(model).in_chunks
    assert_trained_as_by_its_own_loss(model)


def test_an_adapter_on_the_head_is_trained():
    """The adapter adds nothing before the first step, so a comparison of losses would not notice it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head", "q_proj"])
    model = peft.get_peft_model(make_model("llama", tie_word_embeddings=False), config)
    gradients = gradients_of(next_token_loss(model, some_batch())[0], model)
    assert any("lm_head.lora_B" in name and gradient.abs().max() > 0 for name, gradient in gradients.items())
    assert "plain linear layer" in head_of(model).remarks[0]


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
    """256 chunks, each with the same share of the gradient. A sum in bfloat16 would be half as large. Tolerance: the
    head's products are rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, 16, generator=generator).bfloat16().expand(1, 2049, -1)
    weight, labels = torch.randn(VOCAB, 16, generator=generator).bfloat16(), torch.full((1, 2049), 3)
    gradients = []
    for in_chunks, dtype in ((True, torch.bfloat16), (False, torch.float64)):
        model = Linear(hidden.to(dtype), weight.to(dtype), None)
        model.inspected_head = head.Head(in_chunks)
        next_token_loss(model, {"input_ids": labels, "labels": labels})[0].backward()
        gradients.append(model.lm_head.weight.grad.double())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


def test_a_product_is_added_to_all_rows_of_the_gradient():
    """Some thousand rows at a time. Tolerance: the product is rounded to bfloat16."""
    left, right = torch.randn(9000, 5).bfloat16(), torch.randn(5, 3).bfloat16()
    total = torch.full((8999, 3), torch.nan)
    for times in (1, 2):
        head._add_product(total, left, right, is_first=times == 1)
        torch.testing.assert_close(total, times * (left.float() @ right.float())[:8999], rtol=1e-2, atol=1e-2)


def test_no_tensor_is_as_large_as_the_logits(small_chunks):
    model = make_model(vocab_size=2000)
    ids = torch.randint(2000, (8, 64))
    head_of(model)
    with LargestTensor() as largest:
        next_token_loss(model, {"input_ids": ids, "labels": ids})[0].backward()
    assert largest.size < 70_000  # the head's weight has 64,000, the logits 1,008,000


def test_the_loss_counts_the_targets_after_the_shift():
    batch = some_batch()
    num_targets = (batch["labels"][:, 1:] != IGNORED).sum()
    assert 0 < num_targets < 3 * 15
    assert count_targets(batch["labels"]) == num_targets == next_token_loss(make_model(), batch)[1]


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
