"""Kills a run at every file-system event in its output_dir in turn, and compares what it leaves with one left alone.

    python tests/benchmarks/events.py                    each event, one process
    python tests/benchmarks/events.py --processes 2      each event of the main process, two processes
    python tests/benchmarks/events.py --full_disk        instead of a kill, the disk is full at the event

An audit hook of Python counts what a run opens, renames, makes and removes in its output_dir, and strikes just before
event number N, for each N that a run has. (What safetensors does inside of its own code is not seen; the events before
and after it are.) Each attempt is forked from a process that has the libraries loaded. Then the same command runs again
until the run is finished, and each third of these is struck as well, at an event drawn at random. In the end weights,
metrics.jsonl, all_results.json and every exported file (but for timings) must be those of the reference, and the same
files must lie in the folder. With --full_disk an attempt must end with exit status 1 and a sentence, or be finished.
"""

import argparse
import contextlib
import errno
import importlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from kills import free_port  # noqa: E402

EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.listdir",
    "os.scandir",
}
NEED_NO_SPACE = {"os.listdir", "os.scandir", "os.remove", "os.rmdir"}
TIMINGS = {"tokens_per_second", "train_runtime", "checkpoint_runtime", "peak_memory_gib", "exported"}


def prepare(folder):
    """The arguments of a run of six steps: three checkpoints, two of which are removed again, and three evaluations."""
    from pydoc_data.topics import topics

    text = folder / "prose.txt"
    text.write_text("".join(topics[name] for name in sorted(topics))[:20_000], encoding="utf-8")
    return [
        f"--train_file={text}",
        "--tokenizer_vocab_size=300",
        "--model_type=gpt2",
        "--config_overrides=n_layer=1,n_head=2,n_embd=16,n_positions=32",
        "--block_size=16",
        "--learning_rate=1e-2",
        "--max_train_samples=64",
        "--max_eval_samples=8",
        "--per_device_train_batch_size=4",
        "--max_train_steps=6",
        "--logging_steps=1",
        "--eval_steps=3",
        "--checkpointing_steps=2",
        "--checkpoints_total_limit=1",
        "--num_threads=1",
        "--resume_from_checkpoint=auto",
    ]


def attempt(arguments, output_dir, processes, log, strike=0, full_disk=False):
    """Runs the command in processes of its own, which the main one leaves before event number `strike`. Returns (exit
    statuses, number of events)."""
    counted, port, pids = mmap.mmap(-1, 8), free_port() if processes > 1 else 0, []
    for rank in range(processes):
        if pid := os.fork():
            pids.append(pid)
            continue
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        if processes > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in world.items()}
        if rank == 0:
            sys.addaudithook(hook(str(output_dir), counted, strike, full_disk))
        os._exit(run_main([*arguments, f"--output_dir={output_dir}"]))
    statuses = []
    for pid in pids:
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if statuses[0] != 0:  # the main process has died: the others go as a launcher would end them
            for other in pids[1:]:
                os.kill(other, signal.SIGKILL)
    return statuses, int.from_bytes(counted[:], "little")


def load_libraries(arguments, folder):
    """Imports what a run imports, so that the attempts, which are forked from here, need not. A run of this process
    itself would leave threads behind, which do not outlive a fork."""
    from train_loop import run  # noqa: F401

    if not (pid := os.fork()):
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        status = run_main([*arguments, f"--output_dir={folder}/first"])
        (folder / "modules.json").write_text(json.dumps([name for name in sys.modules if "__main__" not in name]))
        os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the first run failed")
    for name in json.loads((folder / "modules.json").read_text()):
        with contextlib.suppress(Exception):  # some can only be imported by another module
            importlib.import_module(name)


def run_main(arguments):
    from train_loop.main import main

    try:
        return main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def hook(folder, counted, strike, full_disk):
    def audit(event, arguments):
        if event not in EVENTS or not arguments:
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        if not path.startswith(folder):
            return
        if full_disk and (
            event in NEED_NO_SPACE or (event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        ):
            return
        number = int.from_bytes(counted[:], "little") + 1
        counted[:] = number.to_bytes(8, "little")
        if number == strike:
            if full_disk:
                raise OSError(errno.ENOSPC, "No space left on device", path)
            os.kill(os.getpid(), signal.SIGKILL)

    return audit


def result(folder):
    """What must be the same in two folders: {name of all that lies there: its content, without timings}."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, content = str(path.relative_to(folder)), path.read_bytes() if path.is_file() else None
        if content is None:
            pass
        elif name == "metrics.jsonl":
            content = [without_timings(json.loads(line)) for line in content.splitlines()]
        elif name == "all_results.json":
            content = without_timings(json.loads(content))
        elif name in ("README.md", "train_config.yaml"):
            content = re.sub(rb"- time: .*|output_dir: .*", b"", content.replace(bytes(folder), b""))
        elif name == "loss_curve.png" or name.endswith(("state.json", "manifest.json")):
            content = None  # their timings cannot be told apart
        found[name] = content
    return found


def without_timings(values):
    return {name: value for name, value in values.items() if name not in TIMINGS}


def harness(processes, full_disk, first, every, seconds, folder):
    """Strikes at each event; returns the counts. Raises SystemExit at the first difference."""
    arguments, log, generator = prepare(folder), folder / "log.txt", random.Random(0)
    load_libraries(arguments, folder)
    statuses, num_events = attempt(arguments, folder / "reference" / "run", processes, log, 0, full_disk)
    if set(statuses) != {0}:
        raise SystemExit(f"the reference run failed; see {log}")
    expected = result(folder / "reference" / "run")
    counts = {"events of a run": num_events, "struck": 0, "struck in a resumed run": 0, "runs": 0, "equal": 0}
    began = time.monotonic()
    for number in range(first, num_events + 1, every):
        if time.monotonic() > began + seconds:
            break
        counts["last event"] = number
        output_dir, strike, resumed = folder / str(number) / "run", number, 0
        while True:
            log.unlink()
            statuses, events = attempt(arguments, output_dir, processes, log, strike, full_disk)
            struck = strike and events >= strike
            counts["struck"] += bool(struck)
            counts["struck in a resumed run"] += bool(struck and resumed)
            said = log.read_text(errors="replace")
            if 99 in statuses or "Traceback" in said:
                raise SystemExit(f"a traceback, event {number} then {strike}; see {log}")
            if set(statuses) == {0}:
                break
            if not struck or statuses[0] not in ((1,) if full_disk else (-signal.SIGKILL,)):
                raise SystemExit(f"exit statuses {statuses}, event {number} then {strike}; see {log}")
            if full_disk and not re.search("^error: .*No space left", said, re.M):
                raise SystemExit(f"no sentence, event {number} then {strike}; see {log}")
            resumed += 1
            strike = generator.randint(1, num_events) if resumed == 1 and number // every % 3 == 0 else 0
        found = result(output_dir)
        if found != expected:
            names = [name for name in {*found, *expected} if found.get(name, 0) != expected.get(name, 0)]
            raise SystemExit(f"{output_dir}, struck at event {number}: {names} differ from the reference's")
        counts["runs"] += 1
        counts["equal"] += 1
        shutil.rmtree(output_dir.parent)
    return counts | {"seconds": round(time.monotonic() - began)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--full_disk", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="strike at each n-th event only")
    parser.add_argument("--first", type=int, default=1, help="begin with this event")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="events_"))
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(
        json.dumps(harness(options.processes, options.full_disk, options.first, options.every, options.seconds, folder))
    )
    shutil.rmtree(folder)
