"""The process: which errors keep their traceback, who of several processes is heard, and a console that breaks."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import PROGRAMS, ROOT, TINY, TINY_CONFIGS, TWO, lines_of, run, without_timings
from forks import LAUNCHED, forked

from train_loop.compare import main as compare
from train_loop.main import main
from train_loop.process.console import printable


@pytest.fixture
def arguments(text_file, tmp_path):
    return [*TINY, f"--train_file={text_file}", "--max_train_steps=5", f"--output_dir={tmp_path}/run"]


def broken_loop(monkeypatch, error):
    def train(*arguments, **options):
        raise error

    monkeypatch.setattr("train_loop.loop.train", train)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("invalid literal for int() with base 10: '0.5'"),
        FileNotFoundError(2, "No such file or directory", "weights.json"),
        RuntimeError("size mismatch in skip_connection.weight"),
        RuntimeError("peer timed out while it could not allocate memory"),
    ],
    ids=repr,
)
def test_an_error_of_the_loop_keeps_its_class_and_its_traceback(error, arguments, monkeypatch, capsys):
    broken_loop(monkeypatch, error)
    with pytest.raises(type(error)):
        main(arguments)
    told = capsys.readouterr().err
    assert "test_process.py" in told and "in train" in told and str(error) in told and "error: process" not in told


def test_out_of_memory_is_a_sentence(arguments, monkeypatch, capsys):
    import torch

    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    for error in raised.value, torch.OutOfMemoryError("CUDA out of memory"), MemoryError():
        broken_loop(monkeypatch, error)
        assert main([*arguments, "--overwrite_output_dir"]) == 1
        told = capsys.readouterr().err
        assert "error: process 0 ran out of memory: give --auto_micro_batch" in told and "Traceback" not in told


@pytest.mark.parametrize(
    "flags, recipe, shown",
    [
        (["--traceback"], "", True),
        (["--traceback=true"], "", True),
        (["--traceback", "false"], "", False),
        (["--traceback=false"], "traceback: true", False),
        ([], "traceback: true", True),
        ([], "", False),
    ],
)
def test_traceback_is_a_setting_like_any_other(flags, recipe, shown, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(f"model_type: gpt5\ntrain_file: {__file__}\noutput_dir: out\n{recipe}\n")
    (tmp_path / "text.txt").write_text("text\n")
    command = ["--config", str(tmp_path / "recipe.yaml"), f"--train_file={tmp_path}/text.txt", *TINY[1:], *flags]
    if shown:
        with pytest.raises(ValueError, match="gpt5"):
            main(command)
    else:
        assert main(command) == 1
    assert ("Traceback" in capsys.readouterr().err) == shown


def test_traceback_shows_an_error_of_the_settings_too(capsys):
    for flags, shown in (["--traceback"], True), (["--traceback=false"], False), ([], False):
        if shown:
            with pytest.raises(ValueError, match="nonsense"):
                main(["--nonsense=1", *flags])
        else:
            assert main(["--nonsense=1", *flags]) == 1
        assert ("Traceback" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("moment", ["training", "end"])
def test_the_process_with_the_error_is_heard(moment, arguments, tmp_path):
    done = forked(PROGRAMS / "fails_on_rank_1.py", moment, *arguments, processes=2)
    assert done.returncode == 1
    told = done.stderr[done.stderr.index("process 1:\n") :]
    assert told.startswith("process 1:\nTraceback (most recent call last):\n")
    assert "fails_on_rank_1.py" in told and "\nRuntimeError: size mismatch in skip_connection.weight\n" in told
    assert "process 0:\n" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_that_wait_for_each_other_end_with_their_launcher(number, arguments, tmp_path):
    pid_files = [tmp_path / f"run.{rank}" for rank in range(2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*TWO, PROGRAMS / "joins_late.py", *arguments], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    ) as launcher:
        while not all(path.is_file() and path.read_text() for path in pid_files):
            assert launcher.poll() is None
            time.sleep(0.1)
        pids = [int(path.read_text()) for path in pid_files]
        time.sleep(1)
        launcher.send_signal(number)
        ends = time.monotonic() + 60  # half an hour is torch's own
        while left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
            if time.monotonic() > ends:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                pytest.fail(f"{len(left)} of 2 processes are left")
            time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_launcher_that_died_before_its_process_looked_is_noticed(arguments, tmp_path):
    """A shell in the place of the launcher, which ends at once. The run does nothing."""
    words = " ".join(f"'{word}'" for word in [sys.executable, "train_loop/main.py", *arguments])
    assert shell(f"setsid sh -c \"(sleep 0.5; exec {words} > '{tmp_path}/told' 2>&1) &\"", **LAUNCHED).returncode == 0
    ends = time.monotonic() + 300
    while "stopped by SIGTERM" not in ((tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""):
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert not (tmp_path / "run").exists()


def killed_by(number, step, arguments, monkeypatch):
    """The exit status of a run that gets a signal after `step`."""
    from train_loop.report import Metrics

    plain = Metrics.count_step

    def count_step(self, now, *rest):
        if now == step:
            os.kill(os.getpid(), number)
        plain(self, now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "count_step", count_step)
        return main(arguments)


def test_a_closed_terminal_saves_as_sigterm_does_and_nohup_keeps_it_off(arguments, tmp_path, monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert killed_by(signal.SIGHUP, 2, arguments, monkeypatch) == 75
        assert "stopped by SIGHUP after step 2 of 5" in capsys.readouterr().err
        assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        resumed = [*arguments, "--resume_from_checkpoint=auto"]
        assert killed_by(signal.SIGHUP, 4, resumed, monkeypatch) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_resumed_from_a_folder_of_another_name_can_be_resumed_again(arguments, tmp_path, monkeypatch, capsys):
    """The exit status is made of whether there is a checkpoint, not of its name."""
    assert killed_by(signal.SIGTERM, 2, arguments, monkeypatch) == 75
    named = (tmp_path / "run" / "checkpoints" / "step-000002").rename(tmp_path / "my best")
    resumed = [*arguments, f"--resume_from_checkpoint={named}", "--checkpointing_steps=none"]

    def stopped_at_once(self, *arguments):
        self.deferred, self.number = True, signal.SIGTERM

    monkeypatch.setattr("train_loop.process.stop.StopSignal.defer", stopped_at_once)
    capsys.readouterr()
    assert main(resumed) == 75
    assert f"--resume_from_checkpoint '{named}'" in capsys.readouterr().err


def shell(command, **environment):
    """A finished command of bash, whose status is that of the first one in a pipe."""
    command = f"set -o pipefail; {command}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, timeout=300)


BROKEN_CONSOLES = {
    "a pipe that ended": "{} 2>&1 | true",
    "a full disk": "{} > /dev/full 2> /dev/full",
    "closed": "{} <&- >&- 2>&-",
}


@pytest.fixture(scope="module")
def unbroken(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert main([*TINY, f"--train_file={text_file}", "--max_train_steps=5", f"--output_dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize("name", BROKEN_CONSOLES)
def test_training_continues_without_a_console(name, unbroken, arguments, tmp_path):
    words = " ".join(f"'{word}'" for word in [sys.executable, "train_loop/main.py", *arguments])
    done = shell(BROKEN_CONSOLES[name].format(words))
    assert done.returncode == 0, done.stderr
    assert without_timings(tmp_path / "run") == without_timings(unbroken)
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["step"] == 5


def test_an_ascii_terminal_gets_escapes_for_what_it_lacks(arguments, tmp_path):
    done = run(
        "-m", "train_loop.main", *arguments, "--sample_prompt=Gr\xfc\xdfe \U0001f600", PYTHONIOENCODING="ascii:strict"
    )
    assert done.returncode == 0, done.stderr
    assert '"Gr\\xfc\\xdfe \\U0001f600"' in done.stdout
    assert "Gr\xfc\xdfe \U0001f600" in lines_of(tmp_path / "run")[0]["samples"]


def test_what_comes_from_outside_is_printed_without_control_characters(capsys):
    assert printable("a\x1b[2J\x9b1m\u202eb\r\ud800c\u2028\t\n") == "a\\x1b[2J\\x9b1m\\u202eb\\r\\ud800c\\u2028\t\n"
    assert (
        printable("Gr\xfc\xdfe \U0001f600 \u05e9\u05dc\u05d5\u05dd")
        == "Gr\xfc\xdfe \U0001f600 \u05e9\u05dc\u05d5\u05dd"
    )
    assert main(["--model_type=\x1b[2Jgpt\u202e\x9b", "--train_file=\rno\x07.txt", "--output_dir=x"]) == 1
    told = capsys.readouterr().err
    assert not set(told) & set("\x1b\u202e\x9b\r\x07") and "\\rno\\x07.txt" in told
    with pytest.raises(SystemExit, match=re.escape("error: \\x1b[2J is not the folder of a run")):
        compare(["\x1b[2J"])


def test_a_progress_bar_keeps_its_line(capsys):
    """tqdm may move the cursor to the beginning of a line and one line up. Other control codes are escaped."""
    from tqdm import tqdm

    from train_loop.process.console import safe_console

    with safe_console():
        outer = tqdm(total=2, desc="outer", mininterval=0, position=0, ncols=60)
        inner = tqdm(total=2, desc="in\x1b[2Jner", mininterval=0, position=1, ncols=60)
        inner.update(1)
        tqdm.write("a row")
        inner.close()
        outer.close()
    out, err = capsys.readouterr()
    assert out == "a row\n" and "\r" in err and "\x1b[A" in err and "\x1b[2J" not in err and "in\\x1b[2Jner" in err


@pytest.mark.parametrize("what", ["code of its own", "pickled weights", "nothing"])
def test_generate_runs_no_foreign_code_and_asks_nothing(what, tmp_path, monkeypatch, capsys):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from train_loop.generate import main as generate

    folder = tmp_path / "mo\x1b[2Jdel"
    folder.mkdir()
    if what == "pickled weights":
        AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **TINY_CONFIGS["gpt2"])).save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        torch.save({"code": print}, folder / "pytorch_model.bin")
    elif what == "code of its own":
        code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    capsys.readouterr()
    assert generate([str(folder), "The value"]) == 1
    out, err = capsys.readouterr()
    assert not (tmp_path / "ran").exists() and "[y/N]" not in out + err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "no model can be loaded from " in line and "mo\\x1b[2Jdel: " in line and "Traceback" not in err


def test_a_resumed_run_says_what_may_change_its_last_bits(arguments, tmp_path, monkeypatch, capsys):
    import torch

    from train_loop.checkpoint import identity

    assert killed_by(signal.SIGTERM, 2, arguments, monkeypatch) == 75
    capsys.readouterr()
    assert killed_by(signal.SIGTERM, 4, [*arguments, "--resume_from_checkpoint=auto"], monkeypatch) == 75
    assert "last bits" not in capsys.readouterr().err  # nothing differs
    monkeypatch.setattr(identity, "version", lambda package: "0.0")
    (tmp_path / "loss.py").write_text("changed")
    monkeypatch.setattr(identity, "CODE", (str(tmp_path / "loss.py"),))
    before = torch.get_num_threads()
    changed = ["--num_threads=2", "--tuning=false"]
    try:
        assert main([*arguments, "--resume_from_checkpoint=auto", *changed]) == 0
    finally:
        torch.set_num_threads(before)
    told = capsys.readouterr().err
    assert "may differ in its last bits" in told and "CPU threads of a process: 1 -> 2" in told
    assert "tuning: True -> False" in told and "-> 0.0" in told and "the code changed since the checkpoint" in told


def test_an_optimizer_of_another_class_is_refused(arguments, monkeypatch, capsys):
    import torch

    assert killed_by(signal.SIGTERM, 2, arguments, monkeypatch) == 75
    monkeypatch.setattr(
        "train_loop.run.build_optimizer", lambda model, s: torch.optim.NAdam(model.parameters(), s.learning_rate)
    )
    assert main([*arguments, "--resume_from_checkpoint=auto"]) == 1
    told = capsys.readouterr().err
    assert "optimizer: torch.optim.adamw.AdamW -> torch.optim.nadam.NAdam" in told and "optimizer's options: " in told
    assert "--resume_with_changes" in told
    assert main([*arguments, "--resume_from_checkpoint=auto", "--resume_with_changes"]) == 0
    assert "its state starts empty" in capsys.readouterr().err


def test_a_checkpoint_of_another_format_is_refused_with_a_sentence(arguments, tmp_path, monkeypatch, capsys):
    from train_loop.checkpoint import identity

    assert killed_by(signal.SIGTERM, 2, arguments, monkeypatch) == 75
    monkeypatch.setattr(identity, "FORMAT", 3)
    assert main([*arguments, "--resume_from_checkpoint=auto"]) == 1
    told = capsys.readouterr().err
    assert "is a checkpoint of format 2, and this version of train_loop reads format 3" in told


def test_a_run_records_the_code_that_it_was_made_with(unbroken):
    from train_loop.process.version import code_version

    state = json.loads((unbroken / "checkpoints" / "step-000005" / "state.json").read_text())
    assert state["train_loop"] == code_version()
    assert json.loads((unbroken / "all_results.json").read_text())["train_loop"] == code_version()
    assert f"# written by train_loop {code_version()}" in (unbroken / "train_config.yaml").read_text()
    assert f"train_loop {code_version()}, torch" in (unbroken / "README.md").read_text()


def test_the_version_names_the_commit_and_whether_it_was_changed(tmp_path):
    from train_loop import __version__
    from train_loop.process.version import code_version

    def git(*words):
        own = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *own, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    plain = code_version.__wrapped__
    assert plain(tmp_path) == __version__
    git("init")
    (tmp_path / "loop.py").write_text("one")
    git("add", "loop.py")
    git("commit", "-m", "one")
    assert plain(tmp_path) == f"{__version__}, commit {git('rev-parse', '--short=12', 'HEAD')}"
    (tmp_path / "loop.py").write_text("two")
    assert plain(tmp_path) == f"{__version__}, commit {git('rev-parse', '--short=12', 'HEAD')}, changed"
