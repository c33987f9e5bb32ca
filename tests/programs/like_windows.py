"""A run without what Windows lacks."""

import os
import signal
import sys

from transformers import AutoModelForCausalLM, GPT2LMHeadModel, get_scheduler  # noqa: F401  read the system's name

sys.modules["resource"] = sys.modules["fcntl"] = None  # importing them fails
del signal.SIGUSR1, signal.SIGHUP, os.sched_getaffinity
from train_loop.main import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
