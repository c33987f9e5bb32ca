"""A run that takes 7 seconds to prepare its training data. Each preparation leaves a file in FOLDER, and fails if the
same process prepares twice."""

import os
import sys
import time
from pathlib import Path

if "CACHES" in os.environ:  # a disk of its own for each host; read when the libraries are imported
    os.environ["HF_HOME"] = f"{os.environ['CACHES']}/{os.uname().nodename}"
from train_loop.data import tokens
from train_loop.main import leave, main

plain = tokens._write_tokens


def slow(path, rows, tokenizer, name, *options):
    done = Path(os.environ["FOLDER"]) / f"{name} on {os.uname().nodename} by {os.environ['RANK']}"
    done.touch(exist_ok=False)
    time.sleep(7 if name == "training" else 0)
    plain(path, rows, tokenizer, name, *options)


tokens._write_tokens = slow
leave(main(sys.argv[1:]))
