"""Asks the token cache for 400,000 bytes. Prints "made" where it has to make them; with "die" it is killed then."""

import os
import signal
import sys

from train_loop.data.token_cache import open_or_make


def write(file):
    print("made", flush=True)
    file.write(bytes(400_000))
    if sys.argv[1] == "die":
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


print(len(open_or_make("key", write)))
