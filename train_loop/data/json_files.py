"""JSON files: an object a line, or one array."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice

from train_loop.data.text_files import BOM, CHUNK_BYTES, Lines, broken, decode, line_at, reading
from train_loop.errors import one_line
from train_loop.files import open_file


class JsonLines(Lines):
    """A file with a JSON object a line; blank lines are no rows."""

    # pairs show a key that is given twice; Python's integers have a limit of digits, and none of them is text
    decoder = json.JSONDecoder(object_pairs_hook=tuple, parse_int=float)

    def _objects(self, path: str, place: int, chunk: bytes) -> Iterator[tuple[int, tuple]]:
        """(byte, object as a tuple of pairs) of each line."""
        for line in chunk.splitlines(keepends=True):
            byte, place = place, place + len(line)
            if not line.removeprefix(BOM).strip():
                continue
            text = decode(path, byte, line).removeprefix("\ufeff")  # files with a BOM that were joined
            try:
                row = self.decoder.decode(text.rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                raise broken(path, line_at(path, byte), _reason(error)) from error
            if not isinstance(row, tuple):
                raise broken(path, line_at(path, byte), "the line is no JSON object")
            yield byte, row

    def texts(self, path: str, place: int, chunk: bytes, column: str) -> list[str]:
        texts = []
        for byte, row in self._objects(path, place, chunk):
            text, problem = _text_of(row, column)
            if problem:
                raise broken(path, line_at(path, byte), problem)
            texts.append(text)
        return texts

    def columns(self, path: str) -> tuple[list[str], list[str]]:
        place, chunk = next(self.chunks(path, 0, CHUNK_BYTES, ""), (0, b""))
        return _columns_of(row for _, row in self._objects(path, place, chunk))

    def num_rows(self, path: str) -> int:
        return sum(
            bool(line.removeprefix(BOM).strip())
            for _, chunk in self.chunks(path, 0, CHUNK_BYTES, "")
            for line in chunk.splitlines(keepends=True)
        )


class JsonArray:
    """A file that is one JSON array, of objects or of texts. It is read into memory at once."""

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

    def chunks(self, path: str, place: int, size: int, column: str) -> Iterator[tuple[int, list[tuple]]]:
        yield 0, list(self._rows(path))

    def texts(self, path: str, place: int, chunk: list[tuple], column: str) -> list[str]:
        texts = []
        for number, row in enumerate(chunk, start=1):
            text, problem = _text_of(row, column)
            if problem:
                raise broken(path, f"row {number:,}", problem)
            texts.append(text)
        return texts

    def columns(self, path: str) -> tuple[list[str], list[str]]:
        return _columns_of(islice(self._rows(path), 1000))

    def num_rows(self, path: str) -> int:
        return sum(1 for _ in self._rows(path))


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return one_line(error)


def _text_of(row: tuple, column: str) -> tuple[str, str]:
    """(the text of a column, "") of a JSON object, as pairs; or ("", what is wrong with it)."""
    values = [value for name, value in row if name == column]
    if len(values) != 1:
        return "", f"the key {column!r} is {'given twice' if values else 'missing'}"
    if not isinstance(values[0], str):
        return "", f"{column!r} is {'null' if values[0] is None else 'no text'}"
    try:
        values[0].encode()
    except UnicodeEncodeError as error:
        letter = f"\\u{ord(values[0][error.start]):04x}"
        return "", f"{column!r} has one half of a surrogate pair, {letter}, which is no character"
    return values[0], ""


def _columns_of(rows: Iterable[tuple]) -> tuple[list[str], list[str]]:
    """(all columns, those of text) of JSON objects: a column is one of text if none of its values is anything else."""
    is_text: dict[str, bool] = {}
    for row in rows:
        for name, value in row:
            is_text[name] = is_text.get(name, True) and (value is None or isinstance(value, str))
    return list(is_text), [name for name, yes in is_text.items() if yes]
