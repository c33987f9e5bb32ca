"""Kills a run at random instants, again and again, and compares what it leaves with a run that was left alone.

    python tests/benchmarks/kills.py --kills 200 --processes 1 --signal KILL

Each attempt is a real process (two, joined by gloo, with --processes 2) of `train_loop.main`, forked from one that has
the libraries loaded already, so that an attempt costs a second. Half of the kills are aimed at a save: the flushing of
files is slowed, and the harness strikes at a random instant after a save began. With --streaming the training data is
streamed, in chunks of 700 bytes and groups of 20 blocks. With --mixture they come from two sources, 70 and 30 percent.
After a kill the same command runs
again, with --resume_from_checkpoint auto, until the run is finished; then weights and metrics.jsonl (but for its
timings) must be those of the reference, bit for bit.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from train_loop import main  # noqa: E402
from train_loop.checkpoint import checkpoint, durable  # noqa: E402
from train_loop.data import sources  # noqa: E402

TIMINGS = ("tokens_per_second",)


def prepare(folder, streaming=False, mixture=False):
    """A text, and the arguments of a run of 39 steps with dropout: three epochs, a checkpoint every fifth step."""
    from pydoc_data.topics import topics

    text = folder / "prose.txt"
    prose = "".join(topics[name] for name in sorted(topics))[:40_000]
    text.write_text(prose, encoding="utf-8")
    data = ["--tokenizer_vocab_size=300", "--max_train_samples=100", f"--train_file={text}"]
    if streaming:
        sources.CHUNK_BYTES = 700  # a hundredth of an epoch
        (folder / "stream.txt").write_text(prose[:7_000], encoding="utf-8")
        if not (pid := os.fork()):  # a tokenizer's threads do not outlive a fork: this process shall not start them
            from train_loop import model
            from train_loop.data.rows import Rows
            from train_loop.settings import settings as config

            rows = Rows.of([prose])
            model.load_tokenizer(config.Settings(tokenizer_vocab_size=300), rows).save_pretrained(folder / "tokenizer")
            os._exit(0)
        os.waitpid(pid, 0)
        data = [f"--tokenizer_name={folder}/tokenizer", f"--train_file={folder}/stream.txt"]
        data += [f"--validation_file={text}", "--streaming", "--shuffle_buffer_size=20", "--max_train_steps=39"]
    if mixture:
        (folder / "other.txt").write_text(prose[-3_000 if streaming else -20_000 :], encoding="utf-8")
        train_file = data.pop(next(i for i, word in enumerate(data) if word.startswith("--train_file"))).split("=")[1]
        items = [
            {"train_file": train_file, "weight": 7},
            {"train_file": f"{folder}/other.txt", "weight": 3, "max_train_samples": 30},
        ]
        (folder / "mixture.json").write_text(json.dumps({"train_file": items}))  # JSON is YAML
        data.append(f"--config={folder}/mixture.json")
    return [
        *data,
        "--model_type=gpt2",
        "--config_overrides=n_layer=1,n_head=2,n_embd=32,n_positions=64",
        "--block_size=32",
        "--learning_rate=1e-2",
        "--max_eval_samples=30",
        "--logging_steps=3",
        "--eval_steps=7",
        "--checkpointing_steps=5",
        "--num_threads=1",
    ]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Attempt:
    """The processes of one attempt. `saving` is a byte that they share: 1 while a checkpoint is written."""

    def __init__(self, arguments, processes, log, slow=0.0):
        self.saving = mmap.mmap(-1, 1)
        port = free_port()
        self.alive = {}
        for rank in range(processes):
            pid = os.fork()
            if not pid:
                os._exit(self._run(arguments, rank, processes, port, log, slow))
            self.alive[pid] = rank
        self.pids, self.codes = list(self.alive), {}

    def _run(self, arguments, rank, processes, port, log, slow):
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if processes > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in (world | address).items()}
        write, flush = checkpoint.Checkpoints._write, durable.flush

        def watched(*values):
            self.saving[0] = 1
            try:
                write(*values)
            finally:
                self.saving[0] = 0

        def slowed(path):
            time.sleep(slow)
            flush(path)

        checkpoint.Checkpoints._write, durable.flush = watched, slowed
        try:
            return main.main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
            return 99
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def poll(self):
        """Whether all processes have ended."""
        for pid in list(self.alive):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[self.alive.pop(pid)] = os.waitstatus_to_exitcode(status)
        return not self.alive

    def wait(self, seconds):
        """Waits at most so long; whether all processes have ended."""
        end = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < end:
            time.sleep(0.002)
        return not self.alive

    def send(self, number):
        for pid in list(self.alive):
            os.kill(pid, number)


def result(output_dir):
    """What must be equal: the exported weights' bytes, and the lines of metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    weights = (output_dir / "model.safetensors").read_bytes()
    return weights, [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def run_with_kills(arguments, output_dir, processes, number, generator, seconds, counts, log, gentle):
    """One run, killed until it is finished. Returns nothing; `counts` is added to."""
    whole_before = -1
    command = [*arguments, f"--output_dir={output_dir}", "--resume_from_checkpoint=auto"]
    while True:
        aim_at_save = not gentle and generator.random() < 0.6
        attempt = Attempt(command, processes, log, slow=0.03 if aim_at_save or gentle else 0.0)
        if counts["kills"] >= counts["wanted"]:
            finished = attempt.wait(300)
        elif aim_at_save:
            for _ in range(generator.randint(1, 3)):  # the first to the third save of this attempt
                while not attempt.poll() and not attempt.saving[0]:
                    time.sleep(0.0005)
                begun = time.monotonic()
                while attempt.saving[0] and not attempt.poll() and time.monotonic() < begun + 0.2:
                    time.sleep(0.001)
                    if generator.random() < 0.01:
                        break
                if attempt.saving[0]:
                    break
            finished = attempt.poll()
        else:
            finished = attempt.wait(generator.random() * (2 * seconds if gentle else seconds))
        if not finished:
            in_save = attempt.saving[0]
            if number == signal.SIGKILL:
                victims = list(attempt.alive)
                os.kill(generator.choice(victims), number)  # one of the processes; the others as a launcher would
                attempt.wait(0.05)
                attempt.send(signal.SIGKILL)
            else:
                attempt.send(number)
            if not attempt.wait(120):
                raise SystemExit(f"hung after the signal; see {log}")
            counts["kills"] += 1
            counts["in a save"] += in_save
        codes = set(attempt.codes.values())
        counts.setdefault("exit statuses", {})
        for code in codes:
            counts["exit statuses"][code] = counts["exit statuses"].get(code, 0) + 1
        lost_a_peer = {1} if processes > 1 and number == signal.SIGKILL else set()
        if codes - {0, 75, 128 + number, -signal.SIGKILL, -number} - lost_a_peer:
            raise SystemExit(f"an attempt ended with {codes}; see {log}")
        steps = durable.steps_in(output_dir / "checkpoints") if output_dir.exists() else []
        whole = [step for step in steps if not durable.damage(output_dir / "checkpoints" / durable.name_of(step))]
        newest = max(whole, default=-1)
        if newest < whole_before:
            raise SystemExit(f"a whole checkpoint was lost: step {whole_before}, now {newest}; see {log}")
        whole_before = newest
        if finished and codes == {0}:
            return


def harness(kills, processes, number, seed, folder, is_streamed, is_mixed):
    """Runs and kills until there were `kills`; returns the counts. Raises SystemExit at the first difference."""
    import torch  # noqa: F401  loaded before forking
    import transformers  # noqa: F401

    from train_loop import run  # noqa: F401

    generator = random.Random(seed)
    arguments, log = prepare(folder, is_streamed, is_mixed), folder / "log.txt"
    began = time.monotonic()
    reference = Attempt([*arguments, f"--output_dir={folder}/reference"], processes, log)
    if not reference.wait(300) or set(reference.codes.values()) != {0}:
        raise SystemExit(f"the reference run failed; see {log}")
    seconds = time.monotonic() - began
    expected = result(folder / "reference")
    counts = {"kills": 0, "wanted": kills, "in a save": 0, "runs": 0, "equal": 0}
    gentle = number != signal.SIGKILL
    while counts["kills"] < kills:
        output_dir = folder / f"run{counts['runs']}"
        run_with_kills(arguments, output_dir, processes, number, generator, seconds, counts, log, gentle)
        counts["runs"] += 1
        if result(output_dir) != expected:
            raise SystemExit(f"{output_dir} differs from the run that was left alone; see {log}")
        counts["equal"] += 1
        shutil.rmtree(output_dir)
    del counts["wanted"]
    return counts | {"seconds of the run left alone": round(seconds, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM", "INT", "USR1"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--mixture", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills_"))
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    number = getattr(signal, f"SIG{options.signal}")
    kinds = options.streaming, options.mixture
    print(json.dumps(harness(options.kills, options.processes, number, options.seed, folder, *kinds)))
    shutil.rmtree(folder)
