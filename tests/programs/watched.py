"""Runs several attempts one after the other, each in a process of its own, forked from one that has the libraries
loaded. An attempt may be killed at a step, or lose the store of its tracker there.

python tests/programs/watched.py '[{"arguments": ["--seed=1"], "store": "folder", "dies_at": 18}]'
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import mlflow  # noqa: F401  once for all
from torch.utils import tensorboard  # noqa: F401

from train_loop import compare, run  # noqa: F401
from train_loop.main import main
from train_loop.report import Metrics

plain = Metrics.count_step
for attempt in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        store = Path(os.environ.setdefault("MLFLOW_TRACKING_URI", "file:" + attempt["store"])[5:])

        def count_step(self, step, *arguments, attempt=attempt, store=store):
            if step == attempt.get("dies_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            if step == attempt.get("loses_its_store_at"):
                shutil.rmtree(store)
                store.write_text("gone")
            plain(self, step, *arguments)

        Metrics.count_step = count_step
        print("::", flush=True)
        status = main(attempt["arguments"])
        sys.stdout.flush()
        os._exit(status)
    print("exit status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
