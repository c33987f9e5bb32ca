"""Messages on stderr, and the class of errors that the user can mend."""

import sys
import traceback
from pathlib import Path

from train_loop.process import printable


class UserError(ValueError):
    """Something that the user can mend: one sentence that says what is wrong, where, and what to do.

    `main.py` prints it without a traceback and exits with 1. Whatever else is raised keeps its class and its traceback:
    the reader of that is changing the code.
    """


def tell(sentence: str) -> None:
    print(printable(sentence), file=sys.stderr, flush=True)


def warn(sentence: str) -> None:
    tell(f"warning: {sentence}")


def one_line(error: BaseException) -> str:
    """The innermost reason of an exception, on one line, at most 300 characters."""
    error = _innermost(error)
    return (" ".join(printable(str(error)).split()) or type(error).__name__)[:300].rstrip(".")


def with_line(error: BaseException) -> str:
    """`one_line`; except for a failing device or a missing library also the class, and the line of this package that
    it came from: it may be a bug."""
    error = _innermost(error)
    if isinstance(error, (OSError, ImportError)):
        return one_line(error)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(__file__).parent)] or frames
    place = f" ({ours[-1].filename}, line {ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {one_line(error)}{place}"


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def num_of(number: int, noun: str) -> str:
    """`1 block`, `2,000 blocks`, `2 processes`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural if number != 1 else ''}"
