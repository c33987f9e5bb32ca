"""Losses that any change to the code must reproduce, unless it means to change the numbers.

Tiny models, fixed seeds, dropout off. Tolerance 2e-4 relative: other processors sum in another order, and a loss of the
eighth step has gone through seven updates; a wrong normalisation, shift or schedule is off by far more.
"""

import pytest
from conftest import make_model, train

pytestmark = pytest.mark.quick

GOLDEN = {
    "gpt2": [4.58254, 4.5931, 4.51337, 4.46804, 4.24375, 4.21801, 4.19372, 4.06828, 4.02718],
    "llama": [4.57554, 4.57854, 4.43853, 4.30594, 4.00666, 3.95392, 3.82692, 3.8524, 3.71848],
}


@pytest.mark.parametrize("model_type", GOLDEN)
def test_the_first_eight_losses_are_what_they_were(model_type, blocks, tmp_path):
    lines, evaluation, _ = train(
        make_model(model_type),
        blocks,
        blocks[:5],
        tmp_path / "run",
        max_train_steps=8,
        learning_rate=1e-2,
        weight_decay=0.1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        num_warmup_steps=2,
    )
    losses = [round(loss, 5) for loss in (*(line["loss"] for line in lines), evaluation["eval_loss"])]
    assert losses == pytest.approx(GOLDEN[model_type], rel=2e-4), (
        f"the first eight losses of {model_type}, or the validation loss after them, changed.\n"
        f"they are:    {losses}\nthey should: {GOLDEN[model_type]}\n"
        "The first one differs: the model, the order of the blocks or the objective. A later one: the gradient (its "
        "normalisation, zero_grad, clipping), the optimizer or the learning rate. Only the last: evaluation.\n"
        "If you meant to change the numbers, put the new ones into GOLDEN, and say why in the commit."
    )
