"""A model out of a GGUF file, written on the spot as llama.cpp's converter writes one."""

import json
import sys

import pytest
import torch
from conftest import TINY, TINY_CONFIGS, lines_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from train_loop.data.rows import load_rows
from train_loop.main import main
from train_loop.model import load_config, load_model, load_tokenizer
from train_loop.settings.command_line import read_settings
from train_loop.settings.settings import Settings

gguf = pytest.importorskip("gguf")


def write_gguf(model, tokenizer, path):
    """Matrices in blocks of 8 bits, which `model` takes over, so that it is what the file holds."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        array, kind = parameter.detach().numpy(), None
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.quantize(array, kind)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(array, kind)))
            if number := heads.get(name.split(".")[-2]):  # rotary halves of a head, row by row in turn
                array = array.reshape(number, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def written(text_file, tmp_path_factory):
    """(folder with tiny.gguf and nothing else, the model in it, its tokenizer)."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = load_tokenizer(Settings(tokenizer_vocab_size=300), load_rows(Settings(train_file=str(text_file)))[0])
    config = AutoConfig.for_model("llama", vocab_size=300, rope_theta=10_000.0, **TINY_CONFIGS["llama"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    write_gguf(model, tokenizer, folder / "tiny.gguf")
    return folder, model.eval(), tokenizer


def test_a_gguf_file_gives_its_model_in_float32_and_its_tokenizer(written, text_file):
    folder, wanted, tokenizer = written
    settings = Settings(model_name_or_path=str(folder), gguf_file="tiny.gguf", block_size=32)
    loaded = load_tokenizer(settings, None)
    text = text_file.read_text()[:2000]
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"] and loaded.eos_token == "<|endoftext|>"
    model = load_model(settings, load_config(settings), loaded)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and all(p.requires_grad for p in model.parameters())
    ids = torch.arange(40)[None] * 7 % 300
    assert torch.equal(model(input_ids=ids).logits, wanted(input_ids=ids).logits)


def test_a_run_from_a_gguf_file_leaves_a_folder_that_needs_none(written, text_file, tmp_path, monkeypatch):
    given = [word for word in TINY if not word.startswith(("--model_type", "--config_over", "--tokenizer"))]
    arguments = [*given, f"--model_name_or_path={written[0]}", "--gguf_file=tiny.gguf", f"--train_file={text_file}"]
    assert main([*arguments, "--max_train_steps=5", f"--output_dir={tmp_path}/run"]) == 0
    losses = [line["eval_loss"] for line in lines_of(tmp_path / "run") if "eval_loss" in line]
    assert losses[-1] < losses[0]
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    assert not any("gguf" in path.read_text() for path in (tmp_path / "run").glob("*config.json"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "run")("The value")["input_ids"]
    assert pipeline("text-generation", str(tmp_path / "run"))("The value", max_new_tokens=3)
    again = ["--eval_only", f"--model_name_or_path={tmp_path}/run", *given, f"--train_file={text_file}"]
    assert main([*again, f"--output_dir={tmp_path}/again"]) == 0
    assert json.loads((tmp_path / "again" / "all_results.json").read_text())["eval_loss"] == losses[-1]


def test_without_the_package_or_the_file_one_sentence_says_so(written, text_file, monkeypatch, capsys, tmp_path):
    arguments = [f"--model_name_or_path={written[0]}", f"--train_file={text_file}", f"--output_dir={tmp_path}/run"]
    with pytest.raises(ValueError, match=r"^gguf_file none\.gguf: no such file in "):
        read_settings([*arguments, "--gguf_file=none.gguf"])
    (tmp_path / "broken.gguf").write_bytes((written[0] / "tiny.gguf").read_bytes()[:5000])
    assert main([*arguments, f"--model_name_or_path={tmp_path}", "--gguf_file=broken.gguf"]) == 1
    assert f"the folder {tmp_path} holds no usable model" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main([*arguments, "--gguf_file=tiny.gguf"]) == 1
    assert capsys.readouterr().err == 'error: gguf_file needs the package gguf: python -m pip install "gguf>=0.19"\n'
