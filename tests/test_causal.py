"""A model that sees the tokens that it is to predict is refused; what a config may ask for, or not, is said."""

import json

import pytest
import torch
import transformers
from conftest import TINY_CONFIGS
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from train_loop.main import main
from train_loop.model import load_config, load_model
from train_loop.probes import is_causal
from train_loop.settings.settings import Settings
from train_loop.vocabulary import AFTER_PADDING

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
# what is_decoder=true makes causal
ENCODERS = {
    "bert": SIZES,
    "bert-generation": SIZES,
    "big_bird": SIZES,
    "camembert": SIZES,
    "data2vec-text": SIZES,
    "electra": {**SIZES, "embedding_size": 32},
    "ernie": SIZES,
    "megatron-bert": SIZES,
    "rembert": {**SIZES, "input_embedding_size": 16, "output_embedding_size": 32},
    "roberta": SIZES,
    "roberta-prelayernorm": SIZES,
    "roc_bert": {**SIZES, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "roformer": {**SIZES, "embedding_size": 32},
    "xlm-roberta": SIZES,
    "xlm-roberta-xl": SIZES,
}
OTHERS = {
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 2},
    "cpmant": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "dim_head": 16, "dim_ff": 64},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
}


def make_tokenizer(ids, **special):
    """A tokenizer of single characters with these ids."""
    vocab = {chr(ord("a") + place): i for place, i in enumerate(ids)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZER = make_tokenizer(range(20), pad_token="c", eos_token="b")


def written(sizes):
    return ",".join(f"{name}={json.dumps(value)}" for name, value in sizes.items())


def from_scratch(model_type, sizes, tokenizer=TOKENIZER, **settings):
    settings = Settings(model_type=model_type, config_overrides=written(sizes) or None, block_size=16, **settings)
    return load_model(settings, load_config(settings), tokenizer)


@pytest.mark.parametrize("model_type", [*ENCODERS, *OTHERS])
def test_a_model_that_sees_the_tokens_after_a_position_is_refused(model_type):
    switch = {"xlm": "causal", "cpmant": "", "xlnet": ""}.get(model_type, "is_decoder")
    way_on = f"Its attention is causal with config_overrides {switch}=true" if switch else "Give a model that predicts"
    with pytest.raises(ValueError, match=f"^{model_type} is not a causal model: .*so it sees .*{way_on}"):
        from_scratch(model_type, (ENCODERS | OTHERS)[model_type])


@pytest.mark.parametrize("model_type", [*ENCODERS, "xlm"])
def test_the_switch_that_the_refusal_names_makes_it_causal(model_type):
    if model_type in ("big_bird", "megatron-bert", "rembert", "roformer") and transformers.__version__ < "5.18":
        pytest.skip("transformers 5.17 lets it see the tokens after a position all the same: it is refused")
    switch = "causal" if model_type == "xlm" else "is_decoder"
    assert is_causal(from_scratch(model_type, {**(ENCODERS | OTHERS)[model_type], switch: True}))


@pytest.mark.parametrize("model_type", [*TINY_CONFIGS, "mamba", "bloom"])
def test_trying_out_whether_a_model_is_causal_changes_nothing(model_type):
    sizes = TINY_CONFIGS.get(model_type, {"hidden_size": 32, "num_hidden_layers": 2})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=97, **sizes)).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    assert is_causal(model)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pretrained_model_that_is_not_causal_is_refused_in_a_sentence(text_file, tmp_path, capsys):
    config = AutoConfig.for_model("bert", vocab_size=20, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
    TOKENIZER.save_pretrained(tmp_path / "bert")
    arguments = [f"--model_name_or_path={tmp_path}/bert", f"--validation_file={text_file}", "--eval_only"]
    capsys.readouterr()
    assert main([*arguments, "--block_size=16", "--max_eval_samples=4"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/bert is not a causal model:") and error.count("\n") == 1
    assert error.endswith(f'Its attention is causal with the config.json of {tmp_path}/bert with "is_decoder": true\n')


@pytest.mark.parametrize("given", ["model_type", "model_name_or_path"])
def test_an_architecture_without_a_causal_model_is_a_short_sentence(given, tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    name = "t5" if given == "model_type" else str(tmp_path)
    with pytest.raises(ValueError, match="transformers has no causal language model of the architecture t5") as error:
        load_config(Settings(**{given: name}))
    assert len(str(error.value)) < 200 + len(name) and "\n" not in str(error.value)


def test_weights_of_a_checkpoint_that_have_no_place_are_named(tmp_path, capsys):
    from_scratch("gpt2", TINY_CONFIGS["gpt2"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "v_head.weight": torch.zeros(1, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    settings = Settings(model_name_or_path=str(tmp_path), block_size=16)
    load_model(settings, load_config(settings), TOKENIZER)
    assert "GPT2LMHeadModel has no place for 1 weight of the checkpoint, e.g. v_head" in capsys.readouterr().err


# positions


@pytest.mark.parametrize("model_type", sorted(AFTER_PADDING))
def test_positions_that_begin_after_the_padding_are_counted_so(model_type):
    sizes = {**SIZES, "is_decoder": True, "max_position_embeddings": 64}
    if model_type == "xmod":
        sizes["default_language"] = "en_XX"
    at_most = 64 - TOKENIZER.pad_token_id - 1
    settings = Settings(model_type=model_type, config_overrides=written(sizes), block_size=at_most)
    model = load_model(settings, load_config(settings), TOKENIZER)
    ids = torch.arange(at_most)[None] % 20
    ids[ids == TOKENIZER.pad_token_id] = 5
    assert model(input_ids=ids).logits.shape == (1, at_most, 20)
    settings.block_size += 1
    with pytest.raises(ValueError, match=r"block_size is 62, but the model has 61 positions \(64 less the 3"):
        load_model(settings, load_config(settings), TOKENIZER)


@pytest.mark.parametrize("model_type", ["roberta", "camembert", "modernbert-decoder"])
def test_a_model_that_needs_a_padding_token_says_so(model_type):
    plain = make_tokenizer(range(20), eos_token="b", bos_token="b")
    sizes = {**SIZES, **({"is_decoder": True} if model_type != "modernbert-decoder" else {})}
    with pytest.raises(ValueError, match=f"{model_type} needs a pad_token_id, and the tokenizer has none"):
        from_scratch(model_type, sizes, plain)
    assert from_scratch(model_type, {**sizes, "pad_token_id": 0}, plain).config.pad_token_id == 0


# vocabulary


def test_the_vocabulary_from_scratch_reaches_the_tokenizers_largest_id():
    gap = make_tokenizer([*range(10), 30])
    assert len(gap) == 11
    assert from_scratch("gpt2", TINY_CONFIGS["gpt2"], gap).get_input_embeddings().num_embeddings == 31


def test_a_larger_vocabulary_is_accepted_and_a_smaller_one_refused():
    sizes = TINY_CONFIGS["gpt2"]
    model = from_scratch("gpt2", {**sizes, "vocab_size": 64})
    assert model.config.vocab_size == 64 and model.get_output_embeddings().weight.shape[0] == 64
    with pytest.raises(ValueError, match=r"vocab_size is 19, but the tokenizer's ids go up to 19. Give at least 20"):
        from_scratch("gpt2", {**sizes, "vocab_size": 19})


def test_special_tokens_are_the_tokenizers_unless_they_are_named():
    sizes = TINY_CONFIGS["gpt2"]
    config = from_scratch("gpt2", sizes).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 1, 2)
    assert from_scratch("gpt2", {**sizes, "bos_token_id": 4, "eos_token_id": 3}).config.bos_token_id == 4


LLAMA = "num_hidden_layers=1,hidden_size=32,intermediate_size=64,num_attention_heads=4"


@pytest.mark.parametrize(
    "model_type, overrides, said",
    [
        ("gpt2", "n_head=0", "ZeroDivisionError"),
        ("gpt2", "n_head=7", "ValueError"),
        ("gpt2", "activation_function=swishh", "swishh"),
        ("gpt2", "n_layer=2.5", "'n_layer=2.5' does not fit a gpt2 config, which has n_layer=12"),
        ("gpt2", "scale_attn_weights=perhaps", "which has scale_attn_weights=true"),
        ("llama", f"{LLAMA},num_key_value_heads=3", "give num_key_value_heads that divides 4"),
        ("llama", "hidden_act=5", "'hidden_act=5' does not fit a llama config"),
        ("reformer", "", "a reformer model cannot be made from its config"),
    ],
)
def test_a_shape_that_no_model_can_have_is_one_sentence(model_type, overrides, said):
    settings = Settings(model_type=model_type, config_overrides=overrides or None, block_size=16)
    with pytest.raises(ValueError) as error:
        load_model(settings, load_config(settings), TOKENIZER)
    assert said in str(error.value) and len(str(error.value)) < 450 and "\n" not in str(error.value)


def test_overrides_are_written_as_the_examples_of_transformers_write_them():
    overrides = "n_layer=1,n_embd=16,n_head=2,resid_pdrop=0.2,scale_attn_weights=false,use_cache=False"
    config = load_config(Settings(model_type="gpt2", config_overrides=overrides))
    assert (config.resid_pdrop, config.scale_attn_weights, config.use_cache) == (0.2, False, False)


@pytest.mark.parametrize("use_cache", [True, False])
def test_whether_a_model_caches_keys_when_it_generates_stays_as_it_was(use_cache, text_file, tmp_path):
    config = AutoConfig.for_model("gpt2", vocab_size=20, use_cache=use_cache, **TINY_CONFIGS["gpt2"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    arguments = [f"--model_name_or_path={tmp_path}/model", f"--train_file={text_file}", f"--output_dir={tmp_path}/out"]
    arguments += ["--block_size=16", "--max_train_samples=8", "--max_eval_samples=4", "--num_train_epochs=1"]
    assert main([*arguments, "--num_threads=1"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").use_cache is use_cache
