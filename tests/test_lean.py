"""Lean modules against those that they stand for."""

import pytest
import torch
import torch.nn.functional as F
from conftest import largest_difference
from test_loop import make_model, train

from train_loop import lean
from train_loop.data.blocks import Split, Windows
from train_loop.lean import DropoutAttention, use_lean_modules
from train_loop.loss import next_token_loss


@pytest.mark.parametrize("document_end", [None, 3], ids=["one_document", "documents"])
def test_lean_modules_train_as_the_ones_they_stand_for(document_end, blocks, tmp_path):
    """With dropout on: they draw the same random numbers. Tolerance: rounding."""
    splits = [Split("blocks", part, document_end=document_end) for part in (blocks, blocks[:5])]
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


@pytest.mark.parametrize("num_scores", [1, 2 * 3 * 12 * 12, 2**18])
def test_attention_with_dropout_equals_torchs_in_groups_of_any_size(num_scores, monkeypatch):
    """Output and gradients. Tolerance: float32 rounding; the scale is multiplied in elsewhere."""
    monkeypatch.setattr(lean, "NUM_SCORES", num_scores)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, 12, 3, 8, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3)]
    grad_output = torch.randn(5, 12, 3, 8, generator=generator)
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
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_lean_modules_keep_less_than_two_thirds_for_the_backward_pass(blocks):
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

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.transformer(ids, use_cache=False).last_hidden_state
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept.append(sum(size for pointer, size in storages.items() if pointer not in weights))
        del hidden
    assert kept[1] < 2 / 3 * kept[0]


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
