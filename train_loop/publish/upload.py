"""A folder to the hub, through a process of the hub's own client."""

import shlex
from pathlib import Path

from train_loop.errors import warn
from train_loop.hub import Client, hub_address

PUSH_SECONDS, PUSH_BYTES_PER_SECOND = 300, 1_000_000  # a push may take this long, and longer by its size


def upload(folder, repository, settings, message=None):
    """Begins to push the files in `folder` but for its checkpoints, and returns the `Client` that does. The repository
    is made if there is none."""
    size = sum(path.stat().st_size for path in Path(folder).iterdir() if path.is_file())
    words = ["upload", repository, str(folder), "--exclude", "checkpoints/*"]
    words += ["--private"] if settings.hub_private_repo else []
    words += ["--commit-message", message] if message else []
    return Client(["-m", "huggingface_hub.cli.hf", *words], PUSH_SECONDS + size / PUSH_BYTES_PER_SECOND, ["hf", *words])


def push(settings, repository, stop):
    """Pushes what a finished run left in output_dir. Nothing that goes wrong here is an error: all of it is on the
    disk, and the warning says how to repeat the push. A stop signal ends it."""
    client = upload(settings.output_dir, repository, settings)
    client.wait(stop)
    if problem := client.problem():
        warn(f"not pushed: {problem}. The model is in {settings.output_dir}. To push it: {shlex.join(client.words)}")
    else:
        print(f"pushed: {hub_address().rstrip('/')}/{repository}", flush=True)
