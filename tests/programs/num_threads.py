"""Two runs, with 1 and with 6 workers that tokenise. Prints how many threads each process has at its end."""

import os
import sys

from train_loop import run  # noqa: F401  once for both
from train_loop.main import main

for num_workers in "1", "6":
    if not (child := os.fork()):
        status = main([*sys.argv[1:], f"--preprocessing_num_workers={num_workers}"])
        print("threads", len(os.listdir("/proc/self/task")), flush=True)
        os._exit(status)
    os.waitpid(child, 0)
