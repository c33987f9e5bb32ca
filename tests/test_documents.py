"""Attention and positions that keep to the documents of a packed block."""

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIGS, VOCAB, make_model, train
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from train_loop.data.blocks import Split, Windows
from train_loop.data.marks import ROW_BEGINS
from train_loop.loss import next_token_loss
from train_loop.model import load_model
from train_loop.probes import keeps_documents_apart
from train_loop.settings.settings import Settings

END = 0
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))


def packed(num_blocks, document_length, seed):
    """Blocks of two equal copies of a random document, each closed by END, and marked where it begins."""
    document = np.random.default_rng(seed).integers(1, VOCAB, size=(num_blocks, document_length - 1), dtype=np.int32)
    document = np.pad(document, ((0, 0), (0, 1)), constant_values=END)
    document[:, 0] |= ROW_BEGINS
    return np.concatenate([document, document], axis=1)


def nats_of(model, blocks, apart):
    window = Windows(blocks, np.arange(len(blocks)), len(blocks), 1, documents_apart=apart)[0]
    with torch.no_grad():
        return next_token_loss(model, {name: value[0] for name, value in window.items()})


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox"])
def test_a_packed_block_has_the_loss_of_its_documents_alone(model_type):
    """Tolerance: float32 rounding."""
    model = make_model(model_type, dropout=True).eval()
    blocks = packed(3, 9, seed=1)
    both, num_targets, _ = nats_of(model, blocks, True)
    first, num_first, _ = nats_of(model, blocks[:, :9], False)
    assert num_targets == 2 * num_first == 2 * 3 * 8
    assert both.item() == pytest.approx(2 * first.item(), rel=1e-6)


def test_the_second_copy_of_a_random_document_does_not_become_predictable(tmp_path):
    """Trained on nothing but doubled random documents, a model learns to copy, unless it cannot see the first copy."""

    def second_copy_loss(apart, name):
        blocks = packed(4096, 9, seed=2)
        options = {"num_train_epochs": 2.0, "learning_rate": 1e-2, "per_device_train_batch_size": 32}
        model = make_model("llama")
        splits = [Split("blocks", rows, documents_apart=apart) for rows in (blocks, blocks[:64])]
        train(model, *splits, tmp_path / name, eval_steps=1000, logging_steps=1000, **options)
        new, model = packed(64, 9, seed=3), model.eval()
        whole, num_whole, _ = nats_of(model, new, apart)
        first, num_first, _ = nats_of(model, new[:, :9], False)
        return (whole - first).item() / (num_whole - num_first).item()

    leaked, kept = second_copy_loss(False, "leaked"), second_copy_loss(True, "kept")
    # 7 of the 8 targets are one of 96 tokens, log(96) = 4.56 nats; the last is END
    assert kept > 0.95 * 7 / 8 * np.log(96), f"{kept:.2f} nats"
    assert leaked < 0.5 * kept, f"the test shows nothing: {leaked:.2f} nats with the first copy in sight"


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_model_that_keeps_documents_apart_is_taken(model_type, tmp_path):
    make_model(model_type).save_pretrained(tmp_path)
    settings = Settings(model_name_or_path=str(tmp_path), document_attention=True, add_eos_token=True)
    load_model(settings, AutoConfig.from_pretrained(tmp_path), TOKENIZER)


@pytest.mark.parametrize("model_type", ["opt", "bloom", "mamba"])
def test_a_model_that_cannot_keep_documents_apart_is_refused(model_type, tmp_path):
    """OPT masks by attention_mask alone, Bloom counts distances over the whole block, Mamba carries a state along."""
    sizes = TINY_CONFIGS.get(model_type, {"hidden_size": 32, "num_hidden_layers": 2, "n_layer": 2, "n_head": 2})
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    assert not keeps_documents_apart(model)
    model.save_pretrained(tmp_path)
    settings = Settings(model_name_or_path=str(tmp_path), document_attention=True, add_eos_token=True)
    with pytest.raises(ValueError, match=f"the attention of {model_type} cannot keep the documents of a block apart"):
        load_model(settings, config, TOKENIZER)
