"""Which code runs: the version of this package, and in a git checkout the commit."""

import functools
import subprocess
from pathlib import Path

from train_loop import __version__

ROOT = Path(__file__).parents[2]


@functools.cache
def code_version(root: Path = ROOT) -> str:
    """For example "0.2.0", or in a git checkout "0.2.0, commit 0123456789ab", with ", changed" after it where a
    tracked file is not as it was committed."""
    if not (root / ".git").exists():  # a worktree has a file there
        return __version__
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--abbrev=12"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # there is no git, or no answer
        return __version__
    if done.returncode:
        return __version__
    return f"{__version__}, commit {done.stdout.strip().replace('-dirty', ', changed')}"
