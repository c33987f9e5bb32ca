"""How each kind of file becomes rows of text. Every text is exactly the file's, never a null or a number.

A format reads a file in chunks. `chunks(path, place, size, columns)` yields (place, chunk) from a place in the file on,
each chunk at least `size` bytes or characters long (the last one may be shorter). A place is a number: a byte of the
unpacked file, or a parquet row; 0 is the beginning. `texts(path, place, chunk, columns)` are the chunk's rows, a
list of `columns.Row`. `columns(path)` is (all columns, those of text, those of lists of messages). `num_rows(path)`
counts the rows.

All of them raise UserError, with the file and the line or row, if a file cannot be read in its format.
"""

import contextlib
import io
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

from train_loop.data.columns import Row, RowColumns
from train_loop.errors import UserError, one_line
from train_loop.files import file_kind, open_file

CHUNK_BYTES = 1 << 19  # about 0.1 s of tokenising
LINES = RowColumns(("text",))  # a file of text has this column
BOM = b"\xef\xbb\xbf"  # some editors and spreadsheets begin a UTF-8 file with it; it is not part of the text


class Format(Protocol):
    def chunks(self, path: str, place: int, size: int, columns: RowColumns) -> Iterator[tuple[int, Any]]: ...

    def texts(self, path: str, place: int, chunk: Any, columns: RowColumns) -> list[Row]: ...

    def columns(self, path: str) -> tuple[list[str], list[str], list[str]]: ...

    def num_rows(self, path: str) -> int: ...


def broken(path: str, where: str, reason: object) -> UserError:
    reason = one_line(reason) if isinstance(reason, Exception) else reason
    return UserError(f"{path} cannot be read as {file_kind(path)}: {where}{': ' if where else ''}{reason}")


def wrong_row(path: str, where: str, problem: str) -> UserError:
    """For a row that can be read, but is not what it must be."""
    return UserError(f"{path}, {where}: {problem}")


@contextlib.contextmanager
def reading(path: str, *more_errors: type[Exception]) -> Iterator[None]:
    """Turns the errors of reading a file into a UserError that names it. `more_errors`: those of a library."""
    mendable: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *more_errors)
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise broken(path, "", f"it is not UTF-8 text ({error.reason})") from error
    except mendable as error:
        raise broken(path, "", error) from error


def line_at(path: str, byte: int) -> str:
    """The line of a byte of the unpacked file, as text for messages."""
    with open_file(path) as file:
        num_lines = sum(piece.count(b"\n") for piece in iter(lambda: file.read(min(1 << 20, byte - file.tell())), b""))
    return f"line {num_lines + 1}"


def decode(path: str, byte: int, content: bytes) -> str:
    """The text of `content`, which begins at this byte of the file. A byte-order mark at byte 0 is left out."""
    has_bom = byte == 0 and content.startswith(BOM)
    try:
        return str(memoryview(content)[len(BOM) :] if has_bom else content, "utf-8")
    except UnicodeDecodeError as error:
        where = line_at(path, byte + error.start + has_bom * len(BOM))
        raise broken(path, where, f"it is not UTF-8 text ({error.reason})") from error


class Lines:
    """A text file: each line is a row. It ends as in Python with \\n, \\r\\n or \\r; the row has \\n."""

    def chunks(self, path: str, place: int, size: int, columns: RowColumns) -> Iterator[tuple[int, bytes]]:
        with reading(path), open_file(path) as file:
            file.seek(place)
            while chunk := file.read(size) + file.readline():
                yield place, chunk
                place += len(chunk)

    def texts(self, path: str, place: int, chunk: bytes, columns: RowColumns) -> list[Row]:
        return list(io.StringIO(decode(path, place, chunk), newline=None))

    def columns(self, path: str) -> tuple[list[str], list[str], list[str]]:
        return ["text"], ["text"], []

    def num_rows(self, path: str) -> int:
        num_rows = 0
        for place, chunk in self.chunks(path, 0, CHUNK_BYTES, LINES):
            text = decode(path, place, chunk)
            num_rows += text.count("\n") + text.count("\r") - text.count("\r\n") + (text[-1:] not in ("\n", "\r", ""))
        return num_rows


class Documents(Lines):
    """A text file that is one row, even if it is empty. Line ends become \\n."""

    def chunks(self, path: str, place: int, size: int, columns: RowColumns) -> Iterator[tuple[int, bytes]]:
        with reading(path), open_file(path) as file:
            yield 0, file.read()

    def texts(self, path: str, place: int, chunk: bytes, columns: RowColumns) -> list[Row]:
        return [io.StringIO(decode(path, place, chunk), newline=None).read()]

    def num_rows(self, path: str) -> int:
        decode(path, 0, next(self.chunks(path, 0, -1, LINES))[1])
        return 1
