"""Files that are whole or not there, and records that may be damaged. Imports nothing heavy."""

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
    """Writes `content` beside `path` and renames it: a reader never finds half a file. A name in a text that is not
    UTF-8 is written with its bytes escaped. `durably`: the content is on the disk before it gets its name. Raises
    UserError, and leaves nothing, where the file cannot be written."""
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
    """The sentence for a file or folder that the disk does not take."""
    return UserError(f"{path} cannot be written: {error.strerror or one_line(error)}")


def utf8(text: str) -> bytes:
    r"""`text` in UTF-8. Python holds a byte of a file's name that is not UTF-8 as a surrogate: it becomes \xe9 here."""
    text = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text)
    return text.encode("utf-8", "backslashreplace")


def read_object(path: Path) -> dict:
    """The JSON object in a file. Raises FileNotFoundError, and UserError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets, thousands of them
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise UserError(f"{path} cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return found
