"""What a model writes while it trains."""

import pytest
import torch
from conftest import TINY_CONFIGS
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from train_loop import generate
from train_loop.data.rows import Rows
from train_loop.model import END_OF_TEXT, load_tokenizer
from train_loop.report.sample import NUM_NEW_TOKENS, Samples
from train_loop.settings.command_line import read_settings
from train_loop.settings.settings import Settings


def make_tokenizer():
    rows = Rows.of(["the value of the name is the value of a class\n" * 20])
    return load_tokenizer(Settings(tokenizer_vocab_size=280), rows)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(params=["gpt2", "llama"])
def model(request, tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **TINY_CONFIGS[request.param], vocab_size=len(tokenizer))
    return AutoModelForCausalLM.from_config(config)


def write(model, tokenizer, prompt, block_size=64):
    settings = Settings(sample_prompt=[prompt], block_size=block_size)
    return Samples(settings, tokenizer).write(model, "cpu")[prompt]


def test_a_sample_is_the_greedy_continuation_and_training_is_left_as_it_was(model, tokenizer):
    prompt = "the value of"
    inputs = tokenizer(prompt, return_tensors="pt")
    model.train()
    before = torch.get_rng_state()
    written = write(model, tokenizer, prompt)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    model.eval()
    options = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS, "eos_token_id": tokenizer.eos_token_id}
    ids = model.generate(**inputs, **options, pad_token_id=0)[0, inputs["input_ids"].shape[1] :]
    assert written == tokenizer.decode(ids, skip_special_tokens=True) and len(written) > 0


def test_of_a_prompt_longer_than_the_context_the_end_is_used(model, tokenizer):
    """The model has 64 positions, the prompt over 100 tokens."""
    prompt = "the value of a class is " * 25
    ids = tokenizer(prompt)["input_ids"]
    assert len(ids) > 100
    end = tokenizer.decode(ids[-16:])
    assert tokenizer(end)["input_ids"] == ids[-16:]
    assert write(model, tokenizer, prompt, block_size=16) == write(model, tokenizer, end, block_size=16) != ""


def test_an_end_of_text_token_that_the_tokenizer_adds_to_a_prompt_is_removed(tokenizer):
    plain = Samples(Settings(sample_prompt=["the value"]), tokenizer).prompts["the value"]
    added = make_tokenizer()
    template = TemplateProcessing(single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, added.eos_token_id)])
    added.backend_tokenizer.post_processor = template
    assert added("the value")["input_ids"] == [*plain, added.eos_token_id]
    assert Samples(Settings(sample_prompt=["the value"]), added).prompts["the value"] == plain
    given = f"the value{END_OF_TEXT}"
    assert Samples(Settings(sample_prompt=[given]), tokenizer).prompts[given] == [*plain, tokenizer.eos_token_id]


def test_several_prompts_come_as_several_texts_or_flags_or_a_list_in_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nsample_prompt: [a, b]\n"
    )
    recipe = ["--config", str(tmp_path / "recipe.yaml")]
    assert read_settings(recipe).sample_prompt == ["a", "b"]
    assert read_settings([*recipe, "--sample_prompt", "c", "d e", "--sample_prompt=f"]).sample_prompt == [
        "c",
        "d e",
        "f",
    ]


def test_the_text_ends_where_the_model_ends_it(model, tokenizer):
    """An output layer that makes the end of text the likeliest token, always."""
    with torch.no_grad():
        model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(len(tokenizer), 32))
    assert tokenizer.eos_token_id == 0
    assert write(model, tokenizer, "the value") == ""


def test_the_space_after_the_prompt_is_kept_where_a_token_begins_with_it(tmp_path, capsys):
    """As SentencePiece has it: the space belongs to the token after it, and a text's first one is not written."""
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "▁once": 2, "▁time": 3}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    config = AutoConfig.for_model("gpt2", **TINY_CONFIGS["gpt2"], vocab_size=4, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # "▁time" is always the likeliest token
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.ln_f.weight.zero_()
        model.lm_head.weight.zero_()[3] = 1
    assert write(model, tokenizer, "once") == " time" * NUM_NEW_TOKENS
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for prompt in ("once", "</s>once"):  # a prompt is written as it was given
        assert generate.main([str(tmp_path), prompt, "--max_new_tokens=3", "--temperature=0"]) == 0
        assert capsys.readouterr().out == f"{prompt} time time time\n"
