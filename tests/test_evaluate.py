"""The evaluation loss and its perplexities, against one token after the other, for four families of models."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_CONFIGS, VOCAB, make_model
from transformers import AutoModelForCausalLM

from train_loop.data.blocks import Split, Windows, load_split
from train_loop.data.rows import Rows
from train_loop.evaluate import evaluate, shares
from train_loop.model import load_tokenizer
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


def sliding(model, blocks, stride, batch_size=3, **fields):
    settings = Settings(per_device_eval_batch_size=batch_size, eval_stride=stride)
    return evaluate(model, Split("validation", blocks, **fields), settings, Accelerator(cpu=True))


@pytest.mark.parametrize("stride", [1, 4, 5, BLOCK - 1])
def test_the_sliding_window_predicts_each_token_once_with_the_context_it_says(stride):
    """Against a forward pass for each token, over the text without its cuts, and over the tokens that follow the last
    block; the last window is short. Tolerance: float32 rounding."""
    model, tail = make_model("llama").eval(), np.arange(1, 8, dtype=np.int32)
    tokens = np.concatenate([BLOCKS.ravel(), tail])
    nats, begin, end = [], 0, 1
    while end < len(tokens):  # a window: targets are the tokens that the window before did not have
        for t in range(end, min(begin + BLOCK, len(tokens))):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor(tokens[None, begin:t], dtype=torch.long)).logits[0, -1]
            nats.append(-logits.log_softmax(-1)[tokens[t]].item())
        begin, end = begin + stride, begin + BLOCK
    for batch_size in (1, 3, 64):
        result = sliding(model, BLOCKS, stride, batch_size, tail=tail)
        assert result["eval_tokens"] == len(nats) == len(tokens) - 1
        assert result["eval_dropped_tokens"] == 0 and result["eval_stride"] == stride
        assert result["eval_nats"] == pytest.approx(sum(nats), rel=1e-6)
        assert result["eval_loss"] == result["eval_nats"] / result["eval_tokens"]


def documented_recipe(model, tokens, max_length, stride):
    """(nats, targets) as in transformers' guide "Perplexity of fixed-length models": one window after the other, labels
    of -100 for what the one before had, the model's own mean loss. The mean is multiplied by the number of tokens that
    it is a mean of; the guide takes one less also for windows after the first."""
    nats = num_targets = previous_end = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        input_ids = torch.tensor(tokens[None, begin:end], dtype=torch.long)
        labels = input_ids.clone()
        labels[:, : previous_end - begin] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=labels).loss.item()
        num = int((labels[:, 1:] != -100).sum())  # of a window of one token there is no loss
        nats, num_targets, previous_end = nats + (loss * num if num else 0), num_targets + num, end
        if end == len(tokens):
            break
    return nats, num_targets


@pytest.mark.parametrize("stride", [5, BLOCK - 1, BLOCK])
@pytest.mark.parametrize("num_in_tail", [0, 1, 9])
def test_the_sliding_window_is_the_documented_recipe_on_the_whole_text(stride, num_in_tail):
    """Llama, whose own loss divides by the targets. Tolerance: float32 rounding of 60 losses."""
    model, tail = make_model("llama").eval(), np.arange(1, 1 + num_in_tail, dtype=np.int32)
    tokens = np.concatenate([BLOCKS.ravel(), tail])
    nats, num_targets = documented_recipe(model, tokens, BLOCK, stride)
    result = sliding(model, BLOCKS, stride, tail=tail)
    assert result["eval_tokens"] == num_targets
    assert result["eval_loss"] == pytest.approx(nats / num_targets, rel=1e-7)


def test_only_a_sliding_window_reaches_the_tokens_after_the_last_block():
    tokenizer = load_tokenizer(Settings(tokenizer_vocab_size=280), Rows.of(["one two three four five " * 9]))
    rows = Rows.of(["Some other words\n", "and a few more of them!"])
    split = {
        stride: load_split(rows, tokenizer, "validation", Settings(block_size=BLOCK, eval_stride=stride, **values))
        for stride, values in ((None, {}), (4, {}), (5, {"max_eval_samples": 1}))
    }
    num_left = split[None].num_tokens % BLOCK
    assert (split[None].num_dropped, len(split[None].tail)) == (num_left, 0) and num_left
    assert (split[4].num_dropped, len(split[4].tail)) == (0, num_left)
    assert (split[5].num_dropped, len(split[5].tail)) == (0, 0)
    assert split[None].summary().endswith(f"; {num_left} token{'s' * (num_left > 1)} dropped")
    left = f"{num_left} token{'s' * (num_left > 1)}"
    assert f"of {BLOCK} and {left}" in split[4].summary() and "dropped" not in split[4].summary()


def test_a_stride_of_one_block_is_the_plain_evaluation():
    model = make_model("gpt2")
    plain, strided = evaluated(model, 2), sliding(model, BLOCKS, BLOCK, 2)
    assert {name: strided[name] for name in plain} == plain
    assert strided["eval_dropped_tokens"] == 0


def test_a_batch_that_is_larger_than_the_data_is_not_filled_up():
    model, num_rows = make_model("gpt2"), []
    evaluated(model, 1)  # whatever the first evaluation of a model tries out
    model.transformer.wte.register_forward_hook(lambda _, inputs, __: num_rows.append(len(inputs[0])))
    for batch_size, expected in ((64, [5]), (3, [3, 2]), (5, [5])):
        num_rows.clear()
        evaluated(model, batch_size)
        assert num_rows == expected


def test_processes_share_the_windows_and_have_equally_many_batches():
    for num_windows, batch_size, world_size in itertools.product((1, 2, 5, 24, 25), (1, 2, 8, 64), (1, 2, 3, 5)):
        of_ranks = [shares(num_windows, batch_size, world_size, rank) for rank in range(world_size)]
        assert {len(batches) for batches in of_ranks} == {-(-num_windows // (batch_size * world_size))}
        windows = [list(window) for batches in of_ranks for window in batches]
        assert sorted(itertools.chain(*windows)) == list(range(num_windows))
        assert max(map(len, windows)) <= batch_size


@pytest.mark.parametrize(
    "world_size, expected", [(1, [(5, 5)]), (2, [(3, 3), (3, 2)]), (8, [(1, 1)] * 5 + [(1, 0)] * 3)]
)
def test_a_micro_batch_that_is_larger_than_the_data_is_not_filled_up(world_size, expected):
    """(blocks, of which with targets) of each process, for a micro-batch of 32."""
    found = []
    for rank in range(world_size):
        windows = Windows(BLOCKS, np.arange(5), 32, 2, world_size, rank)
        (labels,) = windows[0]["labels"]
        assert len(windows) == 1
        found.append((len(labels), int((labels[:, 0] != -100).sum())))
    assert found == expected
