"""Which tokens are targets is decided in one function, for training and evaluation."""

import torch
from conftest import VOCAB, make_model, train

from train_loop.data import blocks as data
from train_loop.data.blocks import IGNORED


def masked(tokens):
    """A prompt's token is written as -1 - id, and is no target."""
    found = plain(abs(tokens + (tokens < 0)))
    found["labels"][tokens < 0] = IGNORED
    return found


plain = data.inputs_and_labels


def test_a_mask_of_prompts_is_one_function_for_training_and_evaluation(blocks, tmp_path, monkeypatch):
    with_prompts = blocks.copy()
    with_prompts[:, :6] = -1 - with_prompts[:, :6]
    monkeypatch.setattr(data, "inputs_and_labels", masked)  # as an edited function would be
    model = make_model()
    labels = torch.from_numpy(blocks.astype("int64"))
    labels[:, :6] = IGNORED
    with torch.no_grad():
        expected = model(torch.from_numpy(blocks.astype("int64")), labels=labels).loss.item()
    lines, evaluation, _ = train(model, with_prompts, with_prompts, tmp_path / "run", learning_rate=1e-30)
    assert with_prompts.max() < VOCAB and with_prompts.min() < 0
    assert [line["tokens_seen"] for line in lines] == [80, 160, 220], "ten targets of each of 22 blocks"
    assert evaluation["eval_tokens"] == 220
    # a learning rate of almost 0: the losses are those of the model before training, to float32's rounding
    assert abs(evaluation["eval_loss"] - expected) < 1e-5
    assert abs(sum(line["loss"] * n for line, n in zip(lines, (80, 80, 60), strict=True)) / 220 - expected) < 1e-5
