"""Runs several of the package's commands, each in a process of its own, forked from one that has the libraries loaded:

python tests/programs/one_after_the_other.py '[["train_loop.main", ["--seed=1"]], ["train_loop.compare", ["runs/a"]]]'
"""

import importlib
import json
import os
import sys

from train_loop import compare, run  # noqa: F401  once for all

for module, arguments in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        status = importlib.import_module(module).main(arguments)
        sys.stdout.flush()
        os._exit(status or 0)
    print("exit status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), arguments, flush=True)
