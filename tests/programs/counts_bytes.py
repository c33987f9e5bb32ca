"""A run that writes to FOLDER, after each step, how many bytes its host has sent."""

import os
import sys
from pathlib import Path

from train_loop.main import leave, main
from train_loop.report import Metrics

plain, sent = Metrics.count_step, Path("/sys/class/net/eth0/statistics/tx_bytes")


def counted(self, step, *values):
    plain(self, step, *values)
    with (Path(os.environ["FOLDER"]) / f"sent by {os.environ['RANK']}").open("a") as file:
        print(int(sent.read_text()), file=file)


Metrics.count_step = counted
leave(main(sys.argv[1:]))
