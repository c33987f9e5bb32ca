"""A run whose first step after the checkpoint of step 5 does not end. It prints "slow" then. The first argument is
its output_dir, the others are the run's."""

import sys
import time
from pathlib import Path

from train_loop import loop
from train_loop.main import main

plain = loop.next_token_loss


def slow(model, batch):
    if model.training and Path(sys.argv[1], "checkpoints", "step-000005").exists():
        print("slow", flush=True)
        time.sleep(600)
    return plain(model, batch)


loop.next_token_loss = slow
sys.exit(main(sys.argv[2:]))
