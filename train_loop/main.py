"""Fine-tune a causal language model with a loop that you can read.

accelerate launch train_loop/main.py                                    the quickstart: a small model, no network
accelerate launch train_loop/main.py --config distilgpt2_wikitext2      a recipe, by name or path
accelerate launch train_loop/main.py --config distilgpt2_wikitext2 --num_train_epochs 1     flags win
accelerate launch --config_file launch_configs/multi_cpu.yaml train_loop/main.py            two processes
accelerate launch --config_file launch_configs/multi_gpu.yaml train_loop/main.py --config distilgpt2_wikitext2
accelerate launch train_loop/main.py --model_name_or_path runs/quickstart --validation_file my.txt --eval_only

Here is the process: its settings, its surroundings, its errors and its exit status. What it does is in `run.py`.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder's modules must not stand in for other packages' (evaluate)
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train_loop import hub, tuning
from train_loop.errors import UserError, tell
from train_loop.report import wanted_trackers
from train_loop.settings import read_settings
from train_loop.stop import Stopped, StopSignal


def main(argv=None):
    """Exit status: 0 done; 1 an error that the user can mend, told in one sentence; 75 stopped by a signal, with a
    checkpoint to go on from; 128 + the signal's number: stopped before there was anything to save."""
    argv = sys.argv[1:] if argv is None else argv
    is_main = int(os.environ.get("RANK", 0)) == 0
    with StopSignal() as stop:
        try:
            settings = read_settings(argv)
            wanted_trackers(settings)  # raises where a library is missing
            unreachable = set_surroundings(settings, is_main)
            repository = hub.check_push(settings, unreachable) if is_main else None
            with tuning.uncollected():  # imported here, not above: --help and a typo answer before torch is loaded
                from train_loop.publish import push
                from train_loop.run import run
            is_finished = run(settings, stop, repository)
            if is_finished and repository:  # all processes have let go of each other
                push(settings, repository, stop)
        except UserError as error:
            if "--traceback" in argv:
                raise
            say(error)
            return 1
        except RuntimeError as error:
            if "--traceback" in argv or not (problem := known_problem(str(error))):
                raise
            # every process says it: one that is gone cannot
            tell(f"error: process {os.environ.get('RANK', 0)} {problem}")
            return 1
        except Stopped as stopped:
            if is_main:
                way_on = ". To go on: the same command with --resume_from_checkpoint auto" if str(stopped) else ""
                tell(f"stopped by {stop.name} {stopped}".rstrip() + way_on)
            return 75 if "step-" in str(stopped) else 128 + stop.number
    return 0


def set_surroundings(settings, is_main):
    """What libraries read from their surroundings when they are imported. Returns whether a hub that is needed cannot
    be reached."""
    if settings.tuning:
        tuning.keep_memory()
    if settings.cache_dir:
        os.environ |= {"HF_HUB_CACHE": settings.cache_dir, "HF_DATASETS_CACHE": settings.cache_dir}
    if settings.preprocessing_num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(settings.preprocessing_num_workers)  # read by tokenizers at first use
    if not (is_main and sys.stderr.isatty()):
        os.environ["TQDM_DISABLE"] = "1"  # some bars of libraries have no other switch
    unreachable = hub.use_cache_if_unreachable(settings)
    if unreachable and is_main:
        tell(f"{hub.hub_address()} cannot be reached: looking in the cache alone")
    return unreachable


def say(error):
    """Prints it. Mostly all processes have met the same one, and a launcher ends the others when one has ended: the
    main process says it, another one only if it is still there three seconds later."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    start = f"error: process {rank}: " if rank else "error: "
    tell("\n".join(start + line for line in str(error).split("\n")))


def known_problem(message):
    """What torch's RuntimeError means for the user; None for one that is nobody's but the programmer's."""
    if re.search(r"allocate memory|out of memory", message):
        return "has too little memory: give --auto_micro_batch, or lower per_device_train_batch_size or block_size"
    if re.search(r"peer|timed? ?out|connection", message, re.IGNORECASE):
        return f"lost its peers: {message.splitlines()[0]}"
    return None


def leave(status):
    """Ends this process. One of several does not go through the interpreter's shutdown: behind a DDP model torch keeps
    gloo's threads alive, whatever is destroyed, and now and then one of them would abort a run that is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
