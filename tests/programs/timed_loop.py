"""A run that prints the seconds that its loop took."""

import sys
import time

from train_loop import loop
from train_loop.main import leave, main

plain = loop.train


def timed(**arguments):
    began = time.perf_counter()
    result = plain(**arguments)
    print("LOOP", time.perf_counter() - began, flush=True)
    return result


loop.train = timed
leave(main(sys.argv[1:]))
