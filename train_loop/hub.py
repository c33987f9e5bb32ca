"""The hub: models and data sets come from it by name, and a finished model is pushed to it.

The hub's client is not imported here; it runs in processes of its own. It reads its environment when it is imported, so
variables must be set before that. And its requests have no time limit, but a process can be ended.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard
from urllib.parse import urlsplit
from urllib.request import getproxies

from train_loop.errors import UserError, warn
from train_loop.process import StopSignal
from train_loop.settings import Settings, sources_of

CONNECT_SECONDS = 5
ANSWER_SECONDS = 30  # for a small question
WHOAMI = """
import huggingface_hub
who = huggingface_hub.whoami()
print("owner and role:", who["name"], who.get("auth", {}).get("accessToken", {}).get("role"))
"""


def hub_address() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def use_cache_if_unreachable(settings: Settings) -> bool:
    """Sets HF_HUB_OFFLINE=1 if `settings` need a hub that cannot be reached. Returns whether it did.

    Otherwise the hub's client would retry for half a minute for each file; offline, it uses its cache at once. It reads
    the variable when it is imported: call this before.
    """
    data_sets = [source.dataset_name for source in sources_of(settings).values()]
    names = [settings.model_name_or_path, settings.config_name, settings.tokenizer_name, *data_sets]
    wanted = any(is_hub_name(name) for name in names) or settings.push_to_hub
    address = urlsplit(hub_address())
    if not wanted or "HF_HUB_OFFLINE" in os.environ or getproxies().get(address.scheme):
        return False
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname, port), CONNECT_SECONDS).close()
        return False
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return True


def is_hub_name(name: object) -> TypeGuard[str]:
    """Whether `name` stands for a model or a data set on the hub: it is neither built in nor a path that exists."""
    return isinstance(name, str) and name not in ("", "python_docs") and not Path(name).exists()


def check_push(settings: Settings, unreachable: bool) -> str | None:
    """The repository that the run will be pushed to, as owner/name if the owner is known; None if the run is not
    pushed. Call it on the main process before anything slow.

    Raises UserError if no push can succeed. A hub that does not answer is a warning: it may answer when the run is
    done.
    """
    if not settings.push_to_hub:
        return None
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = settings.hub_model_id or settings.folder.resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"push_to_hub: {name!r} is not a valid repository name: give --hub_model_id owner/name"
        ) from error
    if not unreachable and os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        raise UserError("HF_HUB_OFFLINE is set, so push_to_hub cannot work: give one of the two")
    if get_token() is None:
        raise UserError("push_to_hub needs a token that can write: set HF_TOKEN, or log in with `hf auth login`")
    if unreachable:
        warn(f"{hub_address()} cannot be reached now: the push is tried anyway when the run is done")
        return name
    question = Client(["-c", WHOAMI], ANSWER_SECONDS)
    question.wait()
    if problem := question.problem():
        warn(f"{hub_address()} did not say whose token this is ({problem}): the push is tried anyway")
        return name
    answer = re.search(r"owner and role: (\S+) (\S+)", question.output())
    assert answer is not None  # as WHOAMI prints it
    owner, role = answer.groups()
    if role == "read":
        warn("this token can only read: the push will fail. Repeat it then with a token that can write")
    return name if "/" in name else f"{owner}/{name}"


class Client:
    """A process of the hub's client: python with `arguments`, ended after `seconds`. `words`: the command as a person
    would type it."""

    def __init__(self, arguments: Sequence[str], seconds: float, words: Sequence[str] = ()) -> None:
        self.words, self.seconds, self.since = words, seconds, time.monotonic()
        self.process: subprocess.Popen | None = None
        self.ended_because: str | None = None
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_COLOR": "1"}
        try:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self.file,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            self.ended_because = str(error)

    def is_running(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            return False
        if time.monotonic() - self.since > self.seconds:
            self.end(f"not finished after {self.seconds:.0f} seconds")
        return not self.ended_because

    def wait(self, stop: StopSignal | None = None) -> None:
        while self.is_running():
            if stop is not None and stop.number:
                self.end(f"stopped by {signal.Signals(stop.number).name}")
            time.sleep(0.05)

    def end(self, reason: str) -> None:
        self.ended_because = reason
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def output(self) -> str:
        self.file.seek(0)
        return self.file.read().decode(errors="replace")

    def problem(self) -> str | None:
        """Why the process failed, on one line; None if it did not."""
        if self.ended_because or self.process is None or not self.process.returncode:
            return self.ended_because
        if self.process.returncode < 0:
            return f"stopped by {signal.Signals(-self.process.returncode).name}"
        # the client's own message, or the last line of Python's traceback; a hint for its developers follows
        text = self.output().split("\nHint: ")[0]
        before, *messages = re.split(r"^(?:[\w.]*Error|[\w.]+(?:Exception|Timeout)): ", text, flags=re.MULTILINE)
        message = messages[-1] if messages else before.strip().split("\n")[-1]
        return (" ".join(message.split()) or f"exit status {self.process.returncode}")[:300].rstrip(".")
