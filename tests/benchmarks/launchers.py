"""Kills launchers at random instants, and counts the processes of a run that outlive them by 10 seconds.

python tests/benchmarks/launchers.py --kills 30

Half of the instants are counted from the launcher's start, from the first millisecond on and mostly early; half from
the moment when its first process is there, and reach into training. SIGKILL and SIGTERM take turns, so do one and two
processes. Ends with 1 where a process is left, which it then ends. Needs Linux.
"""

import argparse
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 10  # seconds from the launcher's end to that of its last process
ARGUMENTS = [
    "--model_type=gpt2",
    "--config_overrides=n_layer=1,n_head=2,n_embd=32,n_positions=64",
    "--tokenizer_vocab_size=300",
    "--block_size=32",
    "--max_train_steps=1000000",
    "--checkpointing_steps=20",
    "--max_eval_samples=8",
    "--num_threads=1",
    "--dataset_name=python_docs",
]


def processes_of(mark, launcher):
    """The ids of the processes that have `mark` in their command, without the launcher."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if mark.encode() in command and int(folder.name) != launcher.pid:
            found.append(int(folder.name))
    return found


def outlived(num_processes, number, seconds, from_first_process, output_dir):
    """(seconds until the run's last process ended, None where one was left; how far the run had come)"""
    config, mark = ROOT / "launch_configs" / ("cpu.yaml" if num_processes == 1 else "multi_cpu.yaml"), str(output_dir)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "train_loop/main.py"]
    log = subprocess.DEVNULL
    launcher = subprocess.Popen([*command, *ARGUMENTS, f"--output_dir={mark}"], cwd=ROOT, stdout=log, stderr=log)
    while from_first_process and not processes_of(mark, launcher):
        time.sleep(0.005)
    time.sleep(seconds)
    has_metrics = (output_dir / "metrics.jsonl").exists()
    stage = "training" if has_metrics else f"{len(processes_of(mark, launcher))} started"
    launcher.send_signal(number)
    began = time.monotonic()
    while left := processes_of(mark, launcher):
        if time.monotonic() - began > PATIENCE:
            break
        time.sleep(0.05)
    took = time.monotonic() - began
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    launcher.wait()  # torch's says at length that it was stopped
    return None if left else took, stage


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--latest", type=float, default=12, help="seconds after which the last ones are killed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    num_left, longest = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(arguments.kills):
            num_processes, number = 1 + i // 2 % 2, (signal.SIGKILL, signal.SIGTERM)[i % 2]
            from_first_process = i % 8 >= 4
            seconds = math.exp(random.uniform(math.log(0.001), math.log(arguments.latest)))
            if from_first_process:
                seconds = random.uniform(0, arguments.latest)
            took, stage = outlived(num_processes, number, seconds, from_first_process, Path(folder) / f"run{i}")
            since = "first process" if from_first_process else "launcher"
            what = f"{num_processes} process(es), {number.name} {seconds:6.3f} s after the {since}'s start ({stage})"
            print(f"{what}: {'A PROCESS IS LEFT' if took is None else f'all ended in {took:.1f} s'}", flush=True)
            num_left, longest = num_left + (took is None), max(longest, took or 0)
    print(f"{arguments.kills} launchers killed, {num_left} left a process behind; the longest took {longest:.1f} s")
    return int(num_left > 0)


if __name__ == "__main__":
    sys.exit(main())
