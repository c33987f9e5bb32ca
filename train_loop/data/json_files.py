"""JSON files: one object a line, or one array."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from train_loop.data.columns import Row, RowColumns, texts_of
from train_loop.data.text_files import BOM, CHUNK_BYTES, LINES, Lines, broken, decode, line_at, reading, wrong_row
from train_loop.errors import one_line
from train_loop.files import open_file


class JsonLines(Lines):
    """A file with one JSON object a line; blank lines are skipped."""

    # pairs show a repeated key; float avoids Python's limit on integer digits, and no number is text
    decoder = json.JSONDecoder(object_pairs_hook=tuple, parse_int=float)

    def _objects(self, path: str, place: int, chunk: bytes) -> Iterator[tuple[int, tuple]]:
        """(byte, object as a tuple of pairs) of each line."""
        for line in chunk.splitlines(keepends=True):
            byte, place = place, place + len(line)
            if not line.removeprefix(BOM).strip():
                continue
            text = decode(path, byte, line).removeprefix("\ufeff")  # joined files have BOMs inside
            try:
                row = self.decoder.decode(text.rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                raise broken(path, line_at(path, byte), _reason(error)) from error
            if not isinstance(row, tuple):
                raise broken(path, line_at(path, byte), "the line is not a JSON object")
            yield byte, row

    def texts(self, path: str, place: int, chunk: bytes, columns: RowColumns) -> list[Row]:
        rows = []
        for byte, pairs in self._objects(path, place, chunk):
            row, problem = _row_of(pairs, columns)
            if problem:
                raise wrong_row(path, line_at(path, byte), problem)
            rows.append(row)
        return rows

    def columns(self, path: str) -> tuple[list[str], list[str], list[str]]:
        place, chunk = next(self.chunks(path, 0, CHUNK_BYTES, LINES), (0, b""))
        return _columns_of(row for _, row in self._objects(path, place, chunk))

    def num_rows(self, path: str) -> int:
        return sum(
            bool(line.removeprefix(BOM).strip())
            for _, chunk in self.chunks(path, 0, CHUNK_BYTES, LINES)
            for line in chunk.splitlines(keepends=True)
        )


class JsonArray:
    """A file that is one JSON array, of objects or of texts. It is read into memory completely."""

    def _rows(self, path: str) -> Iterator[tuple]:
        with reading(path), open_file(path) as file:
            content = decode(path, 0, file.read())
        try:
            rows = JsonLines.decoder.decode(content)
        except (ValueError, RecursionError) as error:
            where = f"line {error.lineno:,}" if isinstance(error, json.JSONDecodeError) else ""
            raise broken(path, where, _reason(error)) from error
        for number, row in enumerate(rows, start=1):
            row = (("text", row),) if isinstance(row, str) else row
            if not isinstance(row, tuple):
                raise broken(path, f"row {number:,}", "it is neither an object nor a text")
            yield row

    def chunks(self, path: str, place: int, size: int, columns: RowColumns) -> Iterator[tuple[int, list[tuple]]]:
        yield 0, list(self._rows(path))

    def texts(self, path: str, place: int, chunk: list[tuple], columns: RowColumns) -> list[Row]:
        rows = []
        for number, pairs in enumerate(chunk, start=1):
            row, problem = _row_of(pairs, columns)
            if problem:
                raise wrong_row(path, f"row {number:,}", problem)
            rows.append(row)
        return rows

    def columns(self, path: str) -> tuple[list[str], list[str], list[str]]:
        return _columns_of(islice(self._rows(path), 1000))

    def num_rows(self, path: str) -> int:
        return sum(1 for _ in self._rows(path))


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return one_line(error)


def _row_of(pairs: tuple, columns: RowColumns) -> tuple[Row, str]:
    """(row, "") from the pairs of a JSON object, or ("", the problem)."""
    values = []
    for column in columns.names:
        found = [value for name, value in pairs if name == column]
        if len(found) != 1:
            return "", f"the key {column!r} is {'given twice' if found else 'missing'}"
        values.append(_plain(found[0]))
    row, problem = columns.row_of(values)
    if problem:
        return "", problem
    try:
        for text in texts_of(row):
            text.encode()
    except UnicodeEncodeError as error:
        letter, where = f"\\u{ord(text[error.start]):04x}", " or ".join(map(repr, columns.names))
        return "", f"{where} has one half of a surrogate pair, {letter}, which is not a character"
    return row, ""


def _plain(value: Any) -> Any:
    """A JSON value with dicts instead of tuples of pairs."""
    if isinstance(value, tuple):
        return {name: _plain(part) for name, part in value}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _columns_of(rows: Iterable[tuple]) -> tuple[list[str], list[str], list[str]]:
    """(all columns, text columns, list columns) of JSON objects. A text column holds only texts, a list column only
    lists; null does not count."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row:
            kinds.setdefault(name, set()).update([] if value is None else [type(value)])
    texts = [name for name, found in kinds.items() if found <= {str}]
    return list(kinds), texts, [name for name, found in kinds.items() if found == {list}]
