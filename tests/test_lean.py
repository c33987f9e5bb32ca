"""Lean modules against those that they stand for."""

import collections
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, largest_difference, lines_of, make_model, train
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from train_loop import lean
from train_loop.data.blocks import Split, Windows
from train_loop.data.marks import ROW_BEGINS
from train_loop.lean import DropoutAttention, use_lean_modules
from train_loop.loss import next_token_loss
from train_loop.main import main


@pytest.mark.parametrize("apart", [False, True], ids=["one_document", "documents"])
def test_lean_modules_train_as_the_ones_they_stand_for(apart, blocks, tmp_path):
    """With dropout on: they draw the same random numbers. Tolerance: rounding."""
    blocks = blocks | np.where(blocks == 3, ROW_BEGINS, 0)
    splits = [Split("blocks", part, documents_apart=apart) for part in (blocks, blocks[:5])]
    theirs = train(make_model(dropout=True), *splits, tmp_path / "theirs")
    model = make_model(dropout=True)
    use_lean_modules(model)
    assert {type(m).__name__ for m in model.modules()} & {"GELU", "NewGELUActivation"} == {"GELU"}
    ours = train(model, *splits, tmp_path / "ours")
    assert [a["loss"] for a in ours[0]] == pytest.approx([b["loss"] for b in theirs[0]], rel=1e-5)
    assert largest_difference(ours[2], theirs[2]) < 1e-5
    dropout = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout))
    x = torch.randn(50, 50)
    torch.manual_seed(3)
    expected = F.dropout(x, dropout.p, training=True)
    torch.manual_seed(3)
    assert torch.equal(dropout.train()(x), expected) and torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("num_heads, length", [(12, 128), (8, 300), (8, 2048), (3, 1)])
@pytest.mark.parametrize("num_threads", [1, 64])
def test_attention_computes_each_head_once_and_few_scores_at_once(num_heads, length, num_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    most, times = max(lean.NUM_SCORES, min(num_threads, num_heads) * length**2), torch.zeros(5, num_heads)
    for some in lean._groups(5, num_heads, length**2):
        times[some] += 1
        assert times[some].numel() * length**2 <= most
    assert (times == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_scores", [1, 2 * 3 * 12 * 12, 2**18])
def test_attention_with_dropout_equals_torchs_in_groups_of_any_size(num_scores, dtype, monkeypatch):
    """Output and gradients. Tolerance: rounding; the scale is multiplied in elsewhere."""
    monkeypatch.setattr(lean, "NUM_SCORES", num_scores)
    generator = torch.Generator().manual_seed(0)
    random = lambda: torch.randn(5, 12, 3, 8, generator=generator).to(dtype)  # noqa: E731
    inputs = [random().transpose(1, 2).requires_grad_() for _ in range(3)]
    grad_output = random()
    seen = torch.ones(12, 12, dtype=torch.bool).tril().expand(5, 1, 12, 12).clone()
    seen[2, :, 6:, :6] = False  # a second document in one of the blocks
    both = []
    for ours in (False, True):
        torch.manual_seed(1)
        if ours:
            output = DropoutAttention.apply(*inputs, ~seen, 0.25, 8**-0.5)
        else:
            output = F.scaled_dot_product_attention(*inputs, attn_mask=seen, dropout_p=0.25).transpose(1, 2)
        both.append([output.detach(), *torch.autograd.grad(output, inputs, grad_output)])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_lean_modules_keep_less_than_two_thirds_for_the_backward_pass(autocast, blocks):
    ids = torch.from_numpy(blocks.astype("int64"))
    kept = []
    for make_lean in (False, True):
        model = make_model(dropout=True)
        if make_lean:
            use_lean_modules(model)
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
            hidden = model.transformer(ids, use_cache=False).last_hidden_state
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept.append(sum(size for pointer, size in storages.items() if pointer not in weights))
        del hidden
    assert kept[1] < 2 / 3 * kept[0]


class Calls(TorchDispatchMode):
    """Counts what torch is asked for: matrix products, and conversions to bfloat16 of each shape."""

    def __init__(self):
        super().__init__()
        self.products, self.rounded = 0, collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        self.rounded[tuple(args[0].shape) if function is torch.ops.aten._to_copy.default else None] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_lean_modules_repeat_no_product_and_round_a_weight_once_in_a_step(autocast, blocks):
    """The backward pass has another conversion, of the weight's gradient."""
    ids, seen = torch.from_numpy(blocks.astype("int64")), []
    for make_lean in (False, True):
        model = make_model(dropout=True)
        if make_lean:
            use_lean_modules(model)
        with Calls() as calls:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden = model.transformer(ids, use_cache=False).last_hidden_state
            hidden.sum().backward()
        seen.append(calls)
    assert seen[1].products == seen[0].products
    for name in ("c_fc", "c_proj"):
        shape = tuple(getattr(model.transformer.h[0].mlp, name).weight.shape)
        assert seen[1].rounded[shape] == (2 * len(model.transformer.h) if autocast else 0)


def test_a_projection_with_a_hook_is_called():
    model, called = make_model(), []
    use_lean_modules(model)
    mlp = model.transformer.h[0].mlp
    mlp.c_proj.register_forward_hook(lambda *arguments: called.append(True))
    mlp(torch.randn(2, 3, mlp.c_fc.weight.shape[0]))
    assert called


def test_evaluation_is_the_same_to_rounding(blocks):
    window = Windows(blocks, range(len(blocks)), len(blocks), 1)[0]
    batch = {name: value[0] for name, value in window.items()}
    nats = []
    for make_lean in (False, True):
        model = make_model(dropout=True).eval()
        if make_lean:
            use_lean_modules(model)
        with torch.no_grad():
            nats.append(next_token_loss(model, batch)[0].item())
    assert nats[1] == pytest.approx(nats[0], rel=1e-6)


MASKS = {
    "no_mask": None,
    "additive": torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf),
    "boolean": torch.ones(6, 6, dtype=torch.bool).tril(1)[None, None],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("of_module, of_call", [(True, None), (False, None), (True, False), (False, True)])
@pytest.mark.parametrize(
    "more", [{}, {"position_bias": torch.linspace(0, 3, 72).view(1, 2, 6, 6)}], ids=["plain", "biased"]
)
def test_attention_is_causal_where_transformers_is(mask, of_module, of_call, more):
    """For each combination of what module, call, mask and bias on positions say. Tolerance: float32 rounding."""
    module = torch.nn.Module().train()
    module.is_causal, module.num_key_value_groups = of_module, 1
    inputs = torch.randn(3, 2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for attention in (lean._attention, sdpa_attention_forward):
        torch.manual_seed(0)
        outputs.append(attention(module, *inputs, MASKS[mask], dropout=1e-7, is_causal=of_call, **more)[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_attention_whose_values_are_wider_than_its_keys_is_transformers_own():
    module = torch.nn.Module().train()
    query, key, value = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 12)
    assert lean._attention(module, query, key, value, None, dropout=0.1)[0].shape == (1, 6, 2, 12)


def test_the_gradient_of_a_softmax_needs_no_private_function_of_torch(monkeypatch):
    scores, grad = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(2, 3, 5, 5)
    probs = scores.softmax(-1)
    wanted = torch.autograd.grad(probs, scores, grad)[0]
    fused = lean._softmax_backward(grad, probs.detach())
    monkeypatch.delattr(torch, "_softmax_backward_data")
    plain = lean._softmax_backward(grad, probs.detach())
    assert plain.data_ptr() != fused.data_ptr()
    torch.testing.assert_close(plain, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fused, wanted, rtol=1e-5, atol=1e-7)


SHORT = [*TINY, "--max_train_steps=3", "--logging_steps=1", "--checkpointing_steps=none"]


def test_internals_of_transformers_that_have_moved_cost_a_warning_and_not_the_run(
    text_file, tmp_path, monkeypatch, capsys
):
    plain = [*SHORT, f"--train_file={text_file}", f"--output_dir={tmp_path}/plain", "--tuning=false"]
    monkeypatch.delitem(sys.modules, "train_loop.lean")
    assert main(plain) == 0 and "train_loop.lean" not in sys.modules
    assert capsys.readouterr().err == ""

    empty = types.ModuleType("transformers.models.gpt2.modeling_gpt2")
    monkeypatch.setitem(sys.modules, "transformers.models.gpt2.modeling_gpt2", empty)
    assert main([*SHORT, f"--train_file={text_file}", f"--output_dir={tmp_path}/moved"]) == 0
    assert "warning: tuning: this version of transformers is not one that lean.py knows" in capsys.readouterr().err
    losses = [[line.get("loss") for line in lines_of(tmp_path / name)] for name in ("plain", "moved")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("what", ["argument", "method"])
def test_attention_that_transformers_calls_in_a_new_way_stays_its_own(what, monkeypatch, capsys):
    def with_sinks(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sinks=None, **kwargs):
        pass

    if what == "argument":
        monkeypatch.setattr(lean, "sdpa_attention_forward", with_sinks)
    else:
        monkeypatch.setattr(lean, "AttentionInterface", types.SimpleNamespace())
    model = make_model(dropout=True)
    use_lean_modules(model)
    assert model.config._attn_implementation == "sdpa"
    assert ("attention takes sinks" if what == "argument" else "register") in capsys.readouterr().err


def test_the_attention_that_is_stood_in_for_takes_what_is_known():
    assert sdpa_attention.sdpa_attention_forward is lean.sdpa_attention_forward and lean.MOVED is None
    model = make_model(dropout=True)
    use_lean_modules(model)
    assert model.config._attn_implementation == "lean"


def test_under_autocast_attention_is_lean_too_and_rounds_its_inputs_as_torchs_does():
    module = torch.nn.Module().train()
    inputs = [torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = lean._attention(module, *inputs, None, dropout=0.1)
    assert output.dtype == torch.bfloat16 and "DropoutAttention" in output.grad_fn.name()
