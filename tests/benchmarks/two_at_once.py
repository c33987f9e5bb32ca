"""Two runs that start in one output_dir at the same moment: one must train, the other must refuse, nothing is mixed.

    python tests/benchmarks/two_at_once.py --times 50

Both are forked from a process that has the libraries loaded, and begin at the same instant of the clock. Each second
time the folder holds an interrupted run, which both are to resume.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from events import load_libraries, prepare, result, run_main  # noqa: E402


def start(arguments, log, at):
    """The process number of a run that begins at the time `at`."""
    if pid := os.fork():
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    time.sleep(max(0.0, at - time.time()))
    os._exit(run_main(arguments))


def statuses(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def harness(times, folder):
    arguments, place = prepare(folder), folder / "place" / "run"
    # longer than the second for which a refused run waits: the other one must still be living then
    arguments += ["--max_train_steps=600", "--eval_steps=100", "--checkpointing_steps=100"]  # the last of a flag wins
    load_libraries(arguments, folder)
    command, interrupted = [*arguments, f"--output_dir={place}"], folder / "interrupted"
    logs = [folder / "0.txt", folder / "1.txt"]
    assert statuses([start([*command, "--checkpoints_total_limit=99"], logs[0], 0)]) == [0], logs[0].read_text()
    shutil.copytree(place, interrupted)  # as a kill after step 100 would leave it
    for checkpoint in interrupted.glob("checkpoints/step-*"):
        if checkpoint.name != "step-000100":
            shutil.rmtree(checkpoint)
    (interrupted / "all_results.json").unlink()
    shutil.rmtree(place)
    assert statuses([start(command, logs[0], 0)]) == [0], logs[0].read_text()
    expected = result(place)
    counts = {"pairs": 0, "one trained, one refused": 0, "the run equal": 0}
    for number in range(times):
        shutil.rmtree(place)
        if number % 2:
            shutil.copytree(interrupted, place)
        at = time.time() + 0.2
        found = statuses([start(command, log, at) for log in logs])
        texts = [log.read_text() for log in logs]
        refused = [text for text in texts if "is used by another run: process " in text]
        counts["pairs"] += 1
        counts["one trained, one refused"] += sorted(found) == [0, 1] and len(refused) == 1
        counts["the run equal"] += result(place) == expected
        if len(set(counts.values())) > 1:
            raise SystemExit(f"exit statuses {found}; {counts}\n" + "\n".join(texts))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="two_at_once_"))
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(json.dumps(harness(options.times, folder)))
    shutil.rmtree(folder)
