"""A run whose process 1 sends itself the signal SIGNAL in step 8, unless it was restarted. It writes its process
number to PID_FILE just before."""

import os
import signal
import sys
from pathlib import Path

from train_loop.main import leave, main
from train_loop.report import Metrics

plain = Metrics.count_step


def dying(self, step, *arguments):
    if step == 8 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    plain(self, step, *arguments)


Metrics.count_step = dying
leave(main(sys.argv[1:]))
