"""The console of a run. It is not the record: whatever becomes of it, training continues, and metrics.jsonl has all."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

PASSWORD = re.compile(r"(?<=://)[^/\s]*@")  # http://user:password@host
# control characters but for line break and tab, C1, lone surrogates, and what turns the direction of text around
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
CURSOR = re.compile(r"(\n|\x1b\[A)*")  # how tqdm moves between its bars


def printable(text: str) -> str:
    """`text` with control characters and overrides of its direction as escapes such as \\x1b, and URLs without the
    user and the password in them. Names, files and samples come from outside, and may hold anything."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), PASSWORD.sub("", text))


class Console:
    """A stream around stdout or stderr that never raises, and writes what is `printable` and what its encoding has.

    Once it cannot be written (`| head` ended, the disk is full, the terminal was closed) it is given up: what comes
    after that goes to os.devnull.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        shown = text
        if not CURSOR.fullmatch(text):
            bar = text[: text.startswith("\r")]  # tqdm draws a bar again from the beginning of its line
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
            # its descriptor is led away, too: else what is buffered would fail once more when the process ends
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self.stream = nowhere


@contextlib.contextmanager
def safe_console() -> Iterator[None]:
    """Within it sys.stdout and sys.stderr are each a `Console`."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would get its number, and be written by C code
            os.open(os.devnull, os.O_RDWR)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Console, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
