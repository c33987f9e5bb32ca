"""The evaluation loss and its perplexities, against one token after the other, for four families of models."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_CONFIGS, VOCAB
from test_loop import make_model
from transformers import AutoModelForCausalLM

from train_loop.data.blocks import Split
from train_loop.evaluate import evaluate, named_perplexities
from train_loop.settings.settings import Settings

BLOCK = 12
BLOCKS = (np.arange(5 * BLOCK) ** 2 * 7 % VOCAB).reshape(5, BLOCK).astype(np.int32)


def evaluated(model, batch_size):
    settings = Settings(per_device_eval_batch_size=batch_size)
    return evaluate(model, Split("validation", BLOCKS), settings, Accelerator(cpu=True))


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_loss_is_the_mean_over_single_tokens_for_any_batch_size(model_type, tmp_path):
    """Each token predicted by a forward pass of its own; 5 blocks, so that the last batch is a short one.
    Tolerance: float32 rounding of products of another shape."""
    model = make_model(model_type, dropout=True).train()  # evaluate itself must switch it off
    state = torch.random.get_rng_state()
    results = [evaluated(model, batch_size) for batch_size in (1, 2, 3, 5, 64)]
    assert model.training and torch.equal(state, torch.random.get_rng_state())

    model.eval()
    with torch.no_grad():
        nats = [
            -model(input_ids=torch.tensor(row[None, :t], dtype=torch.long)).logits[0, -1].log_softmax(-1)[row[t]].item()
            for row in BLOCKS
            for t in range(1, BLOCK)
        ]
    for result in results:
        assert result["eval_tokens"] == len(nats)
        assert result["eval_loss"] == pytest.approx(np.mean(nats), rel=1e-6)

    model.save_pretrained(tmp_path)
    assert evaluated(AutoModelForCausalLM.from_pretrained(tmp_path), 3) == results[2]


def sliding(model, blocks, stride, batch_size=3, **counts):
    settings = Settings(per_device_eval_batch_size=batch_size, eval_stride=stride, named_perplexities=bool(counts))
    return evaluate(model, Split("validation", blocks, **counts), settings, Accelerator(cpu=True))


@pytest.mark.parametrize("stride", [1, 4, 5, BLOCK - 1])
def test_the_sliding_window_predicts_each_token_once_with_the_context_it_says(stride):
    """Against a forward pass for each token, over the text without its cuts. Tolerance: float32 rounding."""
    model = make_model("llama").eval()
    tokens = BLOCKS.ravel()
    nats, begin = [], 0
    while begin + BLOCK <= len(tokens):  # a window: targets are the tokens that the window before did not have
        for t in range(begin + (1 if begin == 0 else BLOCK - stride), begin + BLOCK):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor(tokens[None, begin:t], dtype=torch.long)).logits[0, -1]
            nats.append(-logits.log_softmax(-1)[tokens[t]].item())
        begin += stride
    num_dropped = len(tokens) - (begin - stride + BLOCK)
    for batch_size in (1, 3, 64):
        result = sliding(model, BLOCKS, stride, batch_size)
        assert result["eval_tokens"] == len(nats) == len(tokens) - 1 - num_dropped
        assert result["eval_dropped_tokens"] == num_dropped and result["eval_stride"] == stride
        assert result["eval_nats"] == pytest.approx(sum(nats), rel=1e-6)
        assert result["eval_loss"] == result["eval_nats"] / result["eval_tokens"]


def test_a_stride_of_one_block_is_the_plain_evaluation():
    model = make_model("gpt2")
    plain, strided = evaluated(model, 2), sliding(model, BLOCKS, BLOCK, 2)
    assert {name: strided[name] for name in plain} == plain
    assert strided["eval_dropped_tokens"] == 0


def test_named_perplexities_come_from_the_sums_beside_them():
    counts = {"num_tokens": 63, "num_words": 31, "num_bytes": 170, "num_dropped": 3}
    result = sliding(make_model("gpt2"), BLOCKS, 4, **counts)
    nats = result["eval_loss"] * 63
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / 31))
    assert result["bits_per_byte"] == pytest.approx(nats / 170 / math.log(2))
    assert (result["eval_words"], result["eval_bytes"], result["eval_split_tokens"]) == (31, 170, 63)


def test_a_model_that_guesses_bytes_evenly_has_eight_bits_per_byte():
    """One token a byte, each with probability 1/256: bits_per_byte is 8, and a word of n bytes costs 256**n."""
    split = Split("validation", BLOCKS, num_tokens=60, num_words=12, num_bytes=60)
    named = named_perplexities(math.log(256), split)
    assert named["bits_per_byte"] == pytest.approx(8) and named["word_perplexity"] == pytest.approx(256**5)
