"""What a model does with a block, tried out on a few tokens before training: a config may say otherwise, or nothing."""

from typing import Any

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether the logits at a position stay the same when the tokens after it change. If not, the model sees what it
    is to predict, and its loss means nothing.

    It is tried out, not looked up: two rows of 12 tokens, alike in the first half, go through the model once. Dropout
    is off, and torch's random numbers afterwards are those that would have come without this.
    """
    ids = torch.arange(12).repeat(2, 1) * 7
    ids[1, 6:] += 1
    ids %= _num_embeddings(model)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            first, second = model(input_ids=ids, use_cache=False).logits[:, :6]
    finally:
        model.train(was_training)
    # Rounding aside there is no difference in a causal model. The smallest one seen in a random one that is not was a
    # thousandth of the logits' spread. Logits that are not numbers are the loop's affair: it stops at them.
    return not (first - second).abs().max() > 1e-5 * first.std()


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether a document's logits are the same alone and after another one in a block, when `position_ids` begin anew.

    Tried out, not looked up: a model may accept positions and not mask by them, or carry a state along."""
    ids = torch.arange(12)[None] * 7 % _num_embeddings(model)
    positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
    was_training = model.training
    model.eval()
    try:
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:]
        alone = model(input_ids=ids[:, 6:], use_cache=False).logits
    except TypeError:  # the model takes no positions
        return False
    finally:
        model.train(was_training)
    return torch.allclose(packed, alone, rtol=1e-4, atol=1e-4 * alone.std().item())


def _num_embeddings(model: PreTrainedModel) -> int:
    table: Any = model.get_input_embeddings()  # transformers says Module
    return table.num_embeddings
