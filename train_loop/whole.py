"""Files that are either complete or absent, and JSON files that may be damaged. Imports nothing heavy."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from train_loop.errors import UserError, one_line


def partial_of(path: Path) -> Path:
    """Where `write_whole` writes the file `path` before it renames it."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, content: str | bytes, durably: bool = False) -> None:
    """Writes `content` to a temporary file beside `path` and renames it: a reader never finds half a file. A file name
    in a text that is not UTF-8 is written with its bytes escaped. `durably`: the content is flushed to the disk before
    the file gets its name. Raises UserError if the file cannot be written; nothing is left then."""
    partial = partial_of(path)
    try:
        with open(partial, "wb") as file:
            file.write(utf8(content) if isinstance(content, str) else content)
            if durably:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_be_written(path, error) from error


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cannot_be_written(path: Path | str, error: OSError) -> UserError:
    """The error for a file or folder that cannot be written."""
    return UserError(f"{path} cannot be written: {error.strerror or one_line(error)}")


def utf8(text: str) -> bytes:
    r"""`text` in UTF-8. A byte of a file name that is not UTF-8, which Python keeps as a surrogate, becomes e.g.
    \xe9."""
    text = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text)
    return text.encode("utf-8", "backslashreplace")


def read_object(path: Path) -> dict:
    """The JSON object in a file. Raises FileNotFoundError, and UserError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # the last one: thousands of nested brackets
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise UserError(f"{path} cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: it is not a JSON object")
    return found
