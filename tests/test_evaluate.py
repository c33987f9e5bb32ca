"""The evaluation loss, against one token after the other, for four families of models."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM

from train_loop.config import Settings
from train_loop.evaluate import evaluate

VOCAB, BLOCK = 97, 12
BLOCKS = (np.arange(5 * BLOCK) ** 2 * 7 % VOCAB).reshape(5, BLOCK).astype(np.int32)


def make_model(model_type):
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, **TINY_CONFIGS[model_type])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def evaluated(model, batch_size):
    return evaluate(model, BLOCKS, Settings(per_device_eval_batch_size=batch_size), Accelerator(cpu=True))


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_loss_is_the_mean_over_single_tokens_for_any_batch_size(model_type, tmp_path):
    """Each token predicted by a forward pass of its own; 5 blocks, so that the last batch is a short one.
    Tolerance: float32 rounding of products of another shape."""
    model = make_model(model_type).train()  # evaluate itself must switch dropout off
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
