"""Prints the CPU seconds of 20 short computations of two threads with pauses between them: once as it is, once with
idle threads held, once after those have ended."""

import json
import os
import time

import torch

from train_loop import tuning

torch.set_num_threads(2)
numbers = torch.zeros(2**18)


def cpu_seconds():
    began = time.process_time()
    for _ in range(20):
        numbers.add_(1)
        time.sleep(0.02)
    return time.process_time() - began


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)


cpu_seconds()
num_threads = lambda: len(os.listdir("/proc/self/task"))  # noqa: E731
before, alone = num_threads(), cpu_seconds()
let_go = tuning.hold_threads()
wait_for(lambda: num_threads() >= before + 2 * (tuning.num_cores() - 1))
held = cpu_seconds()
let_go.set()
wait_for(lambda: num_threads() == before)
print(json.dumps({"alone": alone, "held": held, "after": cpu_seconds()}))
