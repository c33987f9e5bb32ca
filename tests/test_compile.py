"""torch.compile of the model below its head."""

import torch
from conftest import VOCAB, make_model
from torch._dynamo.testing import CompileCounter

from train_loop.loss import next_token_loss, plain_next_token_loss
from train_loop.probes import head_of


def some_batch(num_blocks, block_size=16):
    ids = torch.randint(VOCAB, (num_blocks, block_size), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_a_compiled_model_is_compiled_for_its_first_batches_alone():
    """Training with a short last batch, and evaluation with another batch size: no recompilation afterwards."""
    counter, model = CompileCounter(), make_model().train()
    head_of(model)
    model.base_model.compile(backend=counter)
    counts = []
    for _ in range(2):
        for num_blocks in (4, 2):
            next_token_loss(model, some_batch(num_blocks))[0].backward()
        with torch.no_grad():
            plain_next_token_loss(model.eval(), some_batch(3))
            plain_next_token_loss(model, some_batch(5))
        model.train()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0
