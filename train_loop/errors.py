"""Messages on stderr, and the class of errors that the user can mend."""

import sys
import traceback

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
    while error.__cause__ is not None:
        error = error.__cause__
    return (" ".join(printable(str(error)).split()) or type(error).__name__)[:300].rstrip(".")


def with_line(error: Exception) -> str:
    """`one_line`; of anything but an OSError also the class and the line that raised it, because it may be a bug."""
    if isinstance(error, OSError):
        return one_line(error)
    raised = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(error)} ({raised.filename}, line {raised.lineno})"


def num_of(number: int, noun: str) -> str:
    """`1 block`, `2,000 blocks`, `2 processes`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural if number != 1 else ''}"
