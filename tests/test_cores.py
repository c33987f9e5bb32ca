"""Threads beside other processes: they hardly spin while cores are short (`tuning.sharing_cores`)."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import TINY, run_program

from train_loop import tuning
from train_loop.main import main

if not os.path.exists("/proc/self/schedstat"):
    pytest.skip("only Linux says how long a thread waited for a core", allow_module_level=True)


@pytest.fixture(autouse=True)
def no_choice_of_the_user(monkeypatch):
    for name in tuning.HOW_THREADS_WAIT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tuning, "LOOK_SECONDS", 0.01)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def names_of_threads():
    return {thread.name for thread in threading.enumerate()}


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_threads_hardly_spin_while_idle_ones_are_held():
    """That is GNU OpenMP's rule. Without idle threads each computation is followed by milliseconds of spinning."""
    cleaned = [f"-u{name}" for name in tuning.HOW_THREADS_WAIT]
    done = run_program("how_threads_wait.py", launcher=("env", *cleaned, sys.executable), OMP_NUM_THREADS="2")
    seconds = json.loads(done.stdout)
    assert seconds["held"] < seconds["alone"] / 3
    assert seconds["held"] < seconds["after"] / 3


def test_idle_threads_are_held_while_cores_are_short_and_no_longer(two_threads, monkeypatch):
    monkeypatch.setattr(tuning, "STAY_SECONDS", 0.05)
    monkeypatch.setattr(tuning, "SHORT", -1)  # cores count as short, whatever is seen
    with tuning.sharing_cores():
        wait_for(lambda: "idle_team" in names_of_threads())
        monkeypatch.setattr(tuning, "SHORT", float("inf"))
        wait_for(lambda: "idle_team" not in names_of_threads())
        monkeypatch.setattr(tuning, "SHORT", -1)
        wait_for(lambda: "idle_team" in names_of_threads())
    wait_for(lambda: not {"sharing_cores", "idle_team"} & names_of_threads())


def test_a_process_that_waits_for_a_core_is_seen():
    command = [sys.executable, "-c", "while True: pass"]
    before, began = tuning.seconds_without_core(), time.monotonic()
    others = [subprocess.Popen(command) for _ in range(2 * tuning.num_cores())]
    try:
        while time.monotonic() < began + 0.5:  # this process wants a core all the time
            pass
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert tuning.seconds_without_core() - before > tuning.SHORT * 0.5


@pytest.mark.parametrize("name", tuning.HOW_THREADS_WAIT)
def test_the_users_choice_of_how_threads_wait_is_kept(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    with tuning.sharing_cores():
        assert "sharing_cores" not in names_of_threads()


def test_idle_threads_change_no_bit(two_threads):
    numbers = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    compute = lambda: ((numbers @ numbers).softmax(-1).sum(), numbers.view(-1).sum())  # noqa: E731
    before, let_go = compute(), tuning.hold_threads()
    wait_for(lambda: "idle_team" in names_of_threads())
    during = compute()
    let_go.set()
    assert before == during


@pytest.mark.parametrize("tuned", [True, False])
def test_a_run_shares_the_cores_unless_tuning_is_off(tuned, text_file, tmp_path, monkeypatch):
    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread.name), start(thread))[1])
    more = [f"--train_file={text_file}", f"--output_dir={tmp_path}/run", "--max_train_steps=1", f"--tuning={tuned}"]
    assert main([*TINY, *more]) == 0
    assert ("sharing_cores" in started) == tuned and "sharing_cores" not in names_of_threads()
