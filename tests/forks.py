"""Runs whose processes are forked from one that has the libraries loaded: importing them is nearly all that a small run
costs. For tests of what a run does; what a launcher, a shell or an interpreter does with it is tested with those.

`forked` is the tests' side; this file as a program is the other one, which reads a request from each line of its input.
"""

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_DYNAMO_MODE": "default"}


def forked(*arguments, processes=1, timeout=300, **environment):
    """Runs `python ARGUMENTS` from the repository's root, in that many processes that are joined as `accelerate launch`
    joins them. Returns the finished process: its status is 1 where one of several failed, and -9 where it ran longer
    than `timeout` seconds. Libraries have read HF_HOME and other variables already: those do not count here."""
    assert not environment.keys() & {"HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE"}, "too late for these"
    world = {} if processes == 1 else {**LAUNCHED, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "arguments": list(map(str, arguments)),
            "environment": {**os.environ, **{name: str(value) for name, value in (world | environment).items()}},
            "processes": processes,
            "timeout": timeout,
            "folder": folder,
        }
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that forks has ended"
        out, err = (Path(folder, name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    return subprocess.CompletedProcess(request["arguments"], int(answer), out, err)


@functools.cache
def _server():
    server = subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # which closes its input: it ends
    return server


def serve():
    import matplotlib.pyplot  # noqa: F401  a run imports them when it needs them
    import torch._dynamo
    import torch.nn.parallel  # noqa: F401
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel  # noqa: F401

    from train_loop import compare, generate, run  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        pids = {}
        for rank in range(request["processes"]):
            if not (pid := os.fork()):
                return become(request, rank, port)
            pids[pid] = rank
        print(wait_for(list(pids), request["timeout"]), flush=True)


def become(request, rank, port):
    """Runs the command in this process, which has just been forked."""
    for descriptor, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{request['folder']}/out", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, f"{request['folder']}/err", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        os.dup2(os.open(name, flags), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["processes"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv, sys.path[0] = rest, str(ROOT)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        if not (ROOT / first).is_relative_to(ROOT):  # of a changed copy of the package
            for name in [name for name in sys.modules if name.partition(".")[0] == "train_loop"]:
                del sys.modules[name]
        sys.argv, sys.path[0] = request["arguments"], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def wait_for(pids, timeout):
    """The exit status of all. As a launcher does, it stops the others when one has failed, after half a minute hard."""
    single, statuses, end = len(pids) == 1, [], time.monotonic() + timeout
    while pids:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pids.remove(pid)
                statuses.append(os.waitstatus_to_exitcode(status))
                if statuses[-1] and all(status == 0 for status in statuses[:-1]):
                    end = min(end, time.monotonic() + 30)
                    for other in pids:
                        os.kill(other, signal.SIGTERM)
        if time.monotonic() > end:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return statuses[0] if single else int(any(statuses))


if __name__ == "__main__":
    serve()
