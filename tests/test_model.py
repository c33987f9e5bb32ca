"""Model, tokenizer and optimizer."""

import json
import shutil

import datasets
import pytest
import torch
from conftest import PROGRAMS, TINY_CONFIGS
from transformers import AutoConfig, Trainer

from train_loop.main import main
from train_loop.model import load_config, load_model, load_tokenizer
from train_loop.optim import build_optimizer
from train_loop.settings.settings import Settings

ROWS = datasets.Dataset.from_dict({"text": ["Naïve café, 日本語: one two three.\n" * 5]})


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Settings(tokenizer_vocab_size=280), ROWS)


def from_scratch(model_type, tokenizer):
    overrides = ",".join(f"{name}={value}" for name, value in TINY_CONFIGS[model_type].items())
    settings = Settings(model_type=model_type, config_overrides=overrides, block_size=32)
    return load_model(settings, load_config(settings), tokenizer)


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_a_half_precision_checkpoint_is_loaded_as_float32_with_its_ties(model_type, tokenizer, tmp_path):
    model = from_scratch(model_type, tokenizer)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    settings = Settings(model_name_or_path=str(tmp_path), block_size=32)
    loaded = load_model(settings, load_config(settings), tokenizer)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == bool(loaded.config.tie_word_embeddings)


def test_code_that_comes_with_a_model_runs_where_it_is_trusted_and_the_banner_says_so(
    tokenizer, text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    from_scratch("gpt2", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(PROGRAMS / "own_model.py", folder / "own.py")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "auto_map": names, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = [f"--model_name_or_path={folder}", f"--validation_file={text_file}", "--eval_only", "--block_size=32"]
    assert main([*arguments, "--max_eval_samples=4"]) == 1
    wanted = f"error: {folder} comes with Python code of its own: read it, and give --trust_remote_code to run it\n"
    assert capsys.readouterr().err.endswith(wanted)
    assert main([*arguments, "--max_eval_samples=4", "--trust_remote_code"]) == 0
    banner = " ".join(capsys.readouterr().out.split())
    assert f"trusted Python code that comes with {folder} is run (trust_remote_code)" in banner
    assert f"{folder}: own," in banner


def test_weights_from_scratch_are_a_function_of_the_seed(tokenizer):
    first, second = (from_scratch("gpt2", tokenizer).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_config_alone_gives_a_model_of_that_shape_with_the_tokenizers_vocabulary(tokenizer, tmp_path):
    AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, n_positions=64).save_pretrained(tmp_path)
    settings = Settings(config_name=str(tmp_path), block_size=64)
    model = load_model(settings, load_config(settings), tokenizer)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_a_block_longer_than_the_positions_is_refused(model_type):
    overrides = ",".join(f"{name}={value}" for name, value in TINY_CONFIGS[model_type].items())
    with pytest.raises(ValueError, match="block_size is 65, but the model has 64 positions"):
        load_config(Settings(model_type=model_type, config_overrides=overrides, block_size=65))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer, tmp_path):
    from_scratch("gpt2", tokenizer).save_pretrained(tmp_path)
    # 286: more cannot be merged from so short a text
    larger = load_tokenizer(Settings(tokenizer_vocab_size=290), ROWS)
    settings = Settings(model_name_or_path=str(tmp_path), block_size=32)
    with pytest.raises(ValueError, match=r"tokens beyond the model's vocabulary of 280: .* \(280\)"):
        load_model(settings, load_config(settings), larger)


@pytest.mark.parametrize("overrides", ["n_layr=2", "n_layer=two", "n_layer"])
def test_an_override_that_does_not_fit_is_refused(overrides):
    with pytest.raises(ValueError, match="does not fit a gpt2 config"):
        load_config(Settings(model_type="gpt2", config_overrides=overrides))


def test_a_trained_tokenizer_gives_every_text_back(tokenizer):
    text = ROWS[0]["text"] + "never seen: ¿žluťoučký? \t\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 280 and tokenizer.eos_token == "<|endoftext|>"


def test_gpt2s_two_files_alone_are_a_tokenizer(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    loaded = load_tokenizer(Settings(tokenizer_name=str(tmp_path)), None)
    assert loaded("one two three")["input_ids"] == tokenizer("one two three")["input_ids"]


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_decay_is_on_matrices_alone_as_trainer_has_it_and_each_weight_comes_once(model_type, tokenizer, tmp_path):
    model = from_scratch(model_type, tokenizer)
    decayed, rest = build_optimizer(model, Settings(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert sum(p.numel() for group in (decayed, rest) for p in group["params"]) == model.num_parameters()
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in rest["params"])
    names = {id(p): name for name, p in model.named_parameters()}
    trainers = set(Trainer.get_decay_parameter_names(None, model))
    assert {names[id(p)] for p in decayed["params"]} == trainers & set(names.values())


def test_frozen_weights_are_left_out_of_the_optimizer(tokenizer):
    model = from_scratch("gpt2", tokenizer)
    model.get_input_embeddings().weight.requires_grad = False
    frozen = id(model.get_input_embeddings().weight)
    groups = build_optimizer(model, Settings()).param_groups
    assert all(id(p) != frozen for group in groups for p in group["params"])


def test_a_folder_without_weights_is_refused(tokenizer, tmp_path):
    from_scratch("gpt2", tokenizer).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    settings = Settings(model_name_or_path=str(tmp_path), block_size=32)
    with pytest.raises(ValueError, match="holds no usable model"):
        load_model(settings, load_config(settings), tokenizer)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no usable model"):
        load_model(settings, load_config(settings), tokenizer)
