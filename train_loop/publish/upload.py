"""A folder to the hub, through a process of the hub's own client."""

import shlex
from pathlib import Path

from train_loop import lock
from train_loop.checkpoint import damage_of_files
from train_loop.errors import UserError, warn
from train_loop.hub import Client, hub_address
from train_loop.process import StopSignal
from train_loop.settings import Settings
from train_loop.whole import read_object

PUSH_SECONDS, PUSH_BYTES_PER_SECOND = 300, 1_000_000  # a push may take this long, and longer by its size


def upload(folder: Path, repository: str, settings: Settings, message: str | None = None) -> Client:
    """Starts to push the files in `folder`, except its checkpoints. Returns the `Client` that does it. The repository
    is created if it does not exist."""
    size = sum(path.stat().st_size for path in Path(folder).iterdir() if path.is_file())
    words = ["upload", repository, str(folder), "--exclude", "checkpoints/*", "--exclude", lock.NAME]
    words += ["--private"] if settings.hub_private_repo else []
    words += ["--commit-message", message] if message else []
    return Client(["-m", "huggingface_hub.cli.hf", *words], PUSH_SECONDS + size / PUSH_BYTES_PER_SECOND, ["hf", *words])


def push(settings: Settings, repository: str, stop: StopSignal) -> None:
    """Pushes what a finished run left in output_dir, and locks the folder meanwhile. A failure is a warning, not an
    error: everything is on the disk, and the warning says how to repeat the push. A stop signal ends it."""
    folder = settings.folder
    try:
        with lock.held(folder):
            if problem := damage_of_export(folder):
                return warn(f"not pushed: {folder} changed since the run ended: {problem}")
            client = upload(folder, repository, settings)
            client.wait(stop)
    except (UserError, OSError) as error:
        return warn(f"not pushed: {error}")
    if problem := client.problem():
        warn(f"not pushed: {problem}. The model is in {folder}. To push it: {shlex.join(client.words)}")
    else:
        print(f"pushed: {hub_address().rstrip('/')}/{repository}", flush=True)


def damage_of_export(folder: Path) -> str | None:
    """What is wrong with the files that a finished run exported to `folder`, as a clause; None if all are as its
    all_results.json says. Reads every file."""
    try:
        exported = read_object(folder / "all_results.json").get("exported")
    except FileNotFoundError:
        return "all_results.json is missing"
    except UserError as error:
        return str(error)
    if not isinstance(exported, dict) or not exported:
        return "all_results.json does not say which files were exported"
    return damage_of_files(folder, exported)
