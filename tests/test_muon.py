"""Muon: what its steps are, which weights it has, and that a run with it resumes bit for bit."""

import copy

import pytest
import torch
from conftest import TINY, TINY_CONFIGS, VOCAB, assert_same_run, copy_until, make_model, train
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop.main import main
from train_loop.optim import Muon, build_optimizer, orthogonal
from train_loop.settings import Settings

MUON = Settings(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)


def test_singular_values_become_about_one():
    """Between 0.68 and 1.14 where they were not tiny: the iteration is made for speed."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 64), (32, 96), (96, 32)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=generator)))
        assert values.max() < 1.3 and values.median() > 0.65 and values.median() < 1.2, shape


def test_a_transposed_matrix_takes_the_transposed_step():
    """GPT-2 stores its matrices the other way round."""
    generator, ends = torch.Generator().manual_seed(0), []
    matrix, gradient = torch.randn(2, 32, 96, generator=generator)
    for value, slope in ((matrix, gradient), (matrix.T, gradient.T)):
        parameter = torch.nn.Parameter(value.clone(memory_format=torch.contiguous_format))
        parameter.grad = slope.contiguous()
        Muon([parameter], 0.1, 0.1, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])).step()
        ends.append(parameter.detach())
    assert (ends[0] - matrix).abs().mean() > 0.01
    torch.testing.assert_close(ends[1].T, ends[0])


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_three_steps_equal_torchs_muon_for_hidden_matrices_and_torchs_adamw_for_the_rest(model_type):
    """Tolerance: torch's Muon works in bfloat16, with an error of a few hundredths of its steps of 0.2 x the rate."""
    model = make_model(model_type)
    other = copy.deepcopy(model)
    ours = build_optimizer(model, MUON)
    hidden = [p for name, p in other.named_parameters() if p.ndim == 2 and ("h." in name or "layers." in name)]
    rest = [p for p in other.parameters() if all(p is not h for h in hidden)]
    matrices, vectors = ([p for p in rest if (p.ndim == 2) is is_matrix] for is_matrix in (True, False))
    theirs = [
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=1e-2, weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        tolerance = 1e-3 if any(q is h for h in hidden) else 1e-6
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_embeddings_head_biases_and_norms_stay_with_adamw(model_type):
    """Also a head with a matrix of its own."""
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, tie_word_embeddings=False, **TINY_CONFIGS[model_type])
    model = AutoModelForCausalLM.from_config(config)
    hidden, *others = build_optimizer(model, MUON).param_groups
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embeddings
    assert all(p.ndim == 2 and p is not head and p is not embeddings for p in hidden["params"])
    assert sum(len(group["params"]) for group in (hidden, *others)) == len(list(model.parameters()))
    matrices = {id(p) for group in others for p in group["params"] if p.ndim == 2}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    assert matrices == tables | {id(head)}


def test_the_schedule_moves_both_rates(blocks, tmp_path):
    """With a rate of 0 no weight moves: decay is part of a step, too."""
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    values = {"optimizer": "muon", "weight_decay": 0.1, "max_train_steps": 2}
    _, _, after = train(model, blocks, blocks[:5], tmp_path / "run", learning_rate=0.0, **values)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_muon_learns(blocks, tmp_path):
    values = {"optimizer": "muon", "max_train_steps": 20, "learning_rate": 1e-2}
    lines, evaluation, _ = train(make_model(), blocks, blocks[:5], tmp_path / "run", **values)
    assert evaluation["eval_loss"] < lines[0]["loss"] - 1


def test_a_run_with_muon_resumes_bit_for_bit(text_file, tmp_path):
    arguments = [*TINY, f"--train_file={text_file}", "--optimizer=muon"]
    arguments += ["--checkpointing_steps=4", "--max_train_steps=8"]
    assert main([*arguments, f"--output_dir={tmp_path}/alone"]) == 0
    assert "- optimizer: Muon, " in (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")
    copy_until(4, tmp_path / "alone", tmp_path / "resumed")
    assert main([*arguments, f"--output_dir={tmp_path}/resumed", "--resume_from_checkpoint=auto"]) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "alone")


def test_a_checkpoint_of_adamw_is_not_resumed_with_muon(text_file, tmp_path, capsys):
    arguments = [*TINY, f"--train_file={text_file}", "--max_train_steps=2", f"--output_dir={tmp_path}/run"]
    assert main([*arguments, "--checkpointing_steps=1"]) == 0
    assert main([*arguments, "--optimizer=muon", "--resume_from_checkpoint=auto"]) == 1
    assert "optimizer: torch.optim.adamw.AdamW -> train_loop.optim.Muon" in capsys.readouterr().err


def test_under_fsdp_muon_is_refused(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main([*TINY, f"--train_file={text_file}", "--optimizer=muon", f"--output_dir={tmp_path}/run"]) == 1
    assert "muon needs whole matrices" in capsys.readouterr().err and not (tmp_path / "run").exists()
