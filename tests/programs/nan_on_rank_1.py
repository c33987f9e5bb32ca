"""A run in which the loss of process 1 is NaN in step 7."""

import os
import sys

import torch

from train_loop import loop
from train_loop.main import leave, main

plain, num_calls = loop.next_token_loss, 0


def poisoned(model, batch):
    global num_calls
    num_calls += model.training
    nll, count, extras = plain(model, batch)
    is_poisoned = model.training and num_calls == 7 and os.environ["RANK"] == "1"
    return (nll * torch.nan if is_poisoned else nll), count, extras


loop.next_token_loss = poisoned
leave(main(sys.argv[1:]))
