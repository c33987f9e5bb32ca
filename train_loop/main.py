"""Fine-tune a causal language model with a loop that you can read.

accelerate launch train_loop/main.py                                    the quickstart: a small model, no network
accelerate launch train_loop/main.py --config distilgpt2_wikitext2      a recipe, by name or path
accelerate launch train_loop/main.py --config distilgpt2_wikitext2 --num_train_epochs 1     flags win
accelerate launch --config_file launch_configs/multi_cpu.yaml train_loop/main.py            two processes
accelerate launch --config_file launch_configs/multi_gpu.yaml train_loop/main.py --config distilgpt2_wikitext2
accelerate launch train_loop/main.py --model_name_or_path runs/quickstart --validation_file my.txt --eval_only

This file is the process: settings, environment, errors and exit status. What a run does is in `run.py`.
"""

import argparse
import os
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

if __package__ in (None, ""):  # run as a script: this folder's modules must not stand in for other packages' (evaluate)
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train_loop import hub, tuning
from train_loop.errors import UserError, tell
from train_loop.process import Stopped, StopSignal, end_with_launcher, safe_console
from train_loop.report import wanted_trackers
from train_loop.settings import Settings, read_settings


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done; 1 an error that the user can mend, printed as one sentence; 75 stopped by a signal, with a
    checkpoint to resume from; 128 + the signal's number: stopped before there was anything to save.

    Every other error is printed with its traceback, and raised.
    """
    argv = sys.argv[1:] if argv is None else argv
    is_main, settings = int(os.environ.get("RANK", 0)) == 0, None
    with safe_console(), StopSignal() as stop:
        try:
            if sys.platform == "linux":  # Windows has no SIGKILL
                end_with_launcher(signal.SIGKILL)
            settings = read_settings(argv)
            wanted_trackers(settings)  # raises where a library is missing
            unreachable = set_surroundings(settings, is_main)
            repository = hub.check_push(settings, unreachable) if is_main else None
            with tuning.uncollected():  # imported here, not above: --help and a typo answer before torch is loaded
                from train_loop.publish import push
                from train_loop.run import run
            is_finished = run(settings, stop, repository)
            if is_finished and repository:  # the processes are no longer connected
                push(settings, repository, stop)
        except Stopped as stopped:
            if is_main:
                tell(f"stopped by {stop.name} {stopped}".rstrip() + how_to_resume(stopped.checkpoint, settings))
            return 75 if stopped.checkpoint else 128 + stop.number
        except Exception as error:
            sentence = in_a_sentence(error)
            if sentence is None or (settings.traceback if settings else asks_for_traceback(argv)):
                say(error)
                raise
            say(sentence)
            return 1
    return 0


def set_surroundings(settings: Settings, is_main: bool) -> bool:
    """Sets the environment variables that libraries read when they are imported. Returns whether a hub is needed and
    cannot be reached."""
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
        tell(f"{hub.hub_address()} cannot be reached: only the cache is used")
    return unreachable


def how_to_resume(checkpoint: Path | None, settings: Settings | None) -> str:
    if checkpoint is None or settings is None:
        return ""
    is_own = checkpoint.parent == settings.folder / "checkpoints"
    path = "auto" if is_own else shlex.quote(str(checkpoint))
    return f". To resume: the same command with --resume_from_checkpoint {path}"


def asks_for_traceback(argv: list[str]) -> bool:
    """Whether `argv` sets `traceback`. For errors that occur before the settings are read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--traceback", nargs="?", const="true", default="false")
    return parser.parse_known_args(argv)[0].traceback.lower() == "true"


def in_a_sentence(error: Exception) -> str | None:
    """The message for a user who can mend the cause; None if the traceback is needed."""
    rank = int(os.environ.get("RANK", 0))
    if isinstance(error, UserError):
        name = f"process {rank}: " if rank else ""
        return "\n".join(f"error: {name}{line}" for line in str(error).split("\n"))
    if not isinstance(error, (RuntimeError, MemoryError)) or "torch" not in sys.modules:
        return None
    from train_loop.machine import is_lost_peer, is_out_of_memory

    if is_out_of_memory(error):
        advice = "give --auto_micro_batch, or lower per_device_train_batch_size or block_size"
        return f"error: process {rank} ran out of memory: {advice}"
    if is_lost_peer(error):
        reason = str(error).splitlines()[0]
        return f"error: process {rank} lost its peers ({reason}). If one of them had an error, it is printed above"
    return None


def say(problem: Exception | str) -> None:
    """Prints a message, or an exception with its traceback. Usually all processes have the same error, and the launcher
    ends the others as soon as one has ended. So the main process prints at once; any other process waits three seconds
    and prints if it is still alive. It keeps its connections until then, so that its peers wait for it."""
    if rank := int(os.environ.get("RANK", 0)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if isinstance(problem, Exception):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            tell(f"process {rank}:")
        problem = "".join(traceback.format_exception(problem)).rstrip()
    tell(problem)


def leave(status: int) -> NoReturn:
    """Ends this process. If there are several, the interpreter's shutdown is skipped: behind a DDP model torch keeps
    gloo's threads alive, whatever is destroyed, and sometimes one of them would abort a finished run."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    with safe_console():
        try:
            status = main()
        except Exception:  # already printed
            status = 1
    leave(status)
