"""Activations that are computed again in the backward pass: the same run in less memory."""

import pytest
import torch
from conftest import TINY, TINY_CONFIGS, assert_same_run
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from train_loop.main import main
from train_loop.model import load_config, load_model
from train_loop.settings.settings import Settings

SIZES = {
    "gpt2": TINY_CONFIGS["gpt2"] | {"n_layer": 4},
    "llama": TINY_CONFIGS["llama"] | {"num_hidden_layers": 4, "attention_dropout": 0.1},
}

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(300)})))


def overrides(model_type):
    return ",".join(f"{name}={value}" for name, value in SIZES[model_type].items())


@pytest.mark.parametrize("tuning", ["true", "false"])
@pytest.mark.parametrize("model_type", SIZES)
def test_a_run_that_computes_activations_again_is_the_same_bit_for_bit(model_type, tuning, text_file, tmp_path):
    """With dropout on: the same numbers are dropped the second time. With the lean MLP, which recomputes by itself."""
    arguments = [*TINY, f"--model_type={model_type}", f"--config_overrides={overrides(model_type)}"]
    arguments += [f"--train_file={text_file}", "--max_train_steps=3", "--logging_steps=1", f"--tuning={tuning}"]
    arguments += ["--max_eval_samples=4", "--checkpointing_steps=none", "--gradient_accumulation_steps=2"]
    for name in ("plain", "recomputed"):
        more = ["--gradient_checkpointing"] if name == "recomputed" else []
        assert main([*arguments, *more, f"--output_dir={tmp_path}/{name}"]) == 0
    assert_same_run(tmp_path / "recomputed", tmp_path / "plain")


def test_only_the_layers_inputs_are_kept_for_the_backward_pass():
    settings = Settings(model_type="gpt2", config_overrides=overrides("gpt2"), block_size=32)
    ids = torch.arange(120).view(4, 30)
    kept = []
    for settings.gradient_checkpointing in (False, True):
        model = load_model(settings, load_config(settings), TOKENIZER).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            model.base_model(ids, use_cache=False)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 5


def test_a_model_without_it_is_refused(monkeypatch):
    from transformers import GPT2LMHeadModel

    monkeypatch.setattr(GPT2LMHeadModel, "supports_gradient_checkpointing", False)
    settings = Settings(
        model_type="gpt2", config_overrides=overrides("gpt2"), block_size=32, gradient_checkpointing=True
    )
    with pytest.raises(ValueError, match="gradient_checkpointing: transformers does not have it for gpt2"):
        load_model(settings, load_config(settings), TOKENIZER)


def test_accelerates_own_checkpointing_is_refused_because_its_dropout_masks_differ(
    text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")  # what the launcher makes of the launch config
    assert main([*TINY, f"--train_file={text_file}", f"--output_dir={tmp_path}/run"]) == 1
    error = capsys.readouterr().err
    assert "fsdp_activation_checkpointing" in error and "--gradient_checkpointing" in error
