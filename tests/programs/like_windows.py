"""A run without what Windows lacks. The libraries are imported first: on Windows they are other files."""

import os
import signal
import sys
from types import SimpleNamespace

import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import psutil
import torch._dynamo  # noqa: F401
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, get_scheduler  # noqa: F401  read the system's name

memory_info = psutil.Process.memory_info
sys.modules["resource"] = sys.modules["fcntl"] = None  # importing them fails
for module, names in {
    signal: "SIGUSR1 SIGHUP SIGKILL",
    os: "sched_getaffinity pread pwrite sysconf statvfs getloadavg O_CLOEXEC",
}.items():
    for name in names.split():
        delattr(module, name)
psutil.Process.memory_info = lambda self: SimpleNamespace(rss=memory_info(self).rss, peak_wset=memory_info(self).rss)
sys.platform = "win32"
for name in [name for name in sys.modules if name.partition(".")[0] == "train_loop"]:
    del sys.modules[name]  # it looks for them when it is imported
from train_loop.main import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
