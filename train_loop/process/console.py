"""The console of a run. It is not the record: if it fails, training continues, and metrics.jsonl has everything."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

PASSWORD = re.compile(r"(?<=://)[^/\s]*@")  # http://user:password@host
# control characters except line break and tab; C1; lone surrogates; characters that change the direction of text
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
CURSOR = re.compile(r"(\n|\x1b\[A)*")  # how tqdm moves between its bars


def printable(text: str) -> str:
    """`text` with control characters and direction overrides as escapes such as \\x1b, and with URLs without user and
    password. Names, files and samples come from outside and may contain anything."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), PASSWORD.sub("", text))


class Console:
    """A stream around stdout or stderr that never raises. It writes what is `printable` and what its encoding can hold.

    When a write fails (`| head` ended, the disk is full, the terminal was closed), all further output goes to
    os.devnull.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        shown = text
        if not CURSOR.fullmatch(text):
            bar = text[: text.startswith("\r")]  # tqdm redraws a bar from the start of its line
            shown = bar + printable(text[len(bar) :])
        encoding = self.stream.encoding or "utf-8"
        shown = shown.encode(encoding, "backslashreplace").decode(encoding)
        self._try(lambda: self.stream.write(shown))
        if "\n" in shown or "\r" in shown:
            self.flush()
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self.stream.flush())

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except (OSError, ValueError):  # ValueError: the stream is closed
            # redirect the descriptor too: otherwise the buffered text would fail again when the process ends
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self.stream = nowhere


@contextlib.contextmanager
def safe_console() -> Iterator[None]:
    """Inside it, sys.stdout and sys.stderr are `Console`s."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next opened file would get its number, and C code would print into it
            os.open(os.devnull, os.O_RDWR)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Console, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
