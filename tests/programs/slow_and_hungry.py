"""A run whose loss sleeps for 20 ms in training and for 200 ms in evaluation, and that holds 200 MiB for a moment at
its end. Prints how long the loop took, and the peak memory of the process."""

import sys
import time
from pathlib import Path

import torch

from train_loop import evaluate, loop, loss
from train_loop.main import main
from train_loop.report import Metrics


def slow(plain, seconds):
    return lambda *arguments: [time.sleep(seconds), plain(*arguments)][1]


def timed(plain):
    def train(**arguments):
        began = time.perf_counter()
        plain(**arguments)
        print("loop", time.perf_counter() - began)

    return train


def hungry(plain):
    def finish(self, *arguments):
        held = torch.ones(50 << 20)
        del held
        return plain(self, *arguments)

    return finish


loop.next_token_loss = slow(loss.next_token_loss, 0.02)
evaluate.plain_next_token_loss = slow(loss.plain_next_token_loss, 0.2)
loop.train = timed(loop.train)
Metrics.finish = hungry(Metrics.finish)
assert main(sys.argv[1:]) == 0
print("peak", int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20)
