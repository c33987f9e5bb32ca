"""Tables: csv and parquet files."""

import contextlib
import csv
import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from train_loop.data.columns import Row, RowColumns, num_characters
from train_loop.data.text_files import BOM, broken, line_at, reading, wrong_row
from train_loop.files import open_file

csv.field_size_limit(2**31 - 1)  # a cell may be a document; Python's default is 128 KiB


class Csv:
    """A file of comma separated values (.tsv: of tabs) with a header. A cell is always text. Line breaks
    within quotes are kept. An empty line is not a row."""

    def _records(self, path: str, byte: int) -> Iterator[tuple[int, list[str]]]:
        """(byte where it begins, its cells) of each record from a byte on."""
        with reading(path, csv.Error), open_file(path) as file:
            file.seek(byte)
            if byte == 0 and file.read(len(BOM)) == BOM:
                byte = len(BOM)
            file.seek(byte)
            end = byte

            def lines() -> Iterator[str]:
                nonlocal end
                for line in io.TextIOWrapper(file, "utf-8", newline=""):
                    end += len(line) if line.isascii() else len(line.encode())
                    yield line

            delimiter = "\t" if ".tsv" in Path(path).name.lower() else ","
            try:
                for cells in csv.reader(lines(), delimiter=delimiter, strict=True):
                    if cells:
                        yield byte, cells
                    byte = end
            except (csv.Error, UnicodeDecodeError) as error:
                reason = f"it is not UTF-8 text ({error.reason})" if isinstance(error, UnicodeError) else error
                raise broken(path, f"in the record at {line_at(path, byte)}", reason) from error

    def _header(self, path: str) -> list[str]:
        return next(self._records(path, 0), (0, []))[1]

    def chunks(
        self, path: str, place: int, size: int, columns: RowColumns
    ) -> Iterator[tuple[int, list[tuple[int, list[str]]]]]:
        records, chunk, length = self._records(path, place), [], 0
        if place == 0:
            next(records, None)
        for byte, cells in records:
            chunk.append((byte, cells))
            length += sum(map(len, cells))
            if length >= size:
                yield chunk[0][0], chunk
                chunk, length = [], 0
        if chunk:
            yield chunk[0][0], chunk

    def texts(self, path: str, place: int, chunk: list[tuple[int, list[str]]], columns: RowColumns) -> list[Row]:
        header = self._header(path)
        indices = [_only_index(path, header, name) for name in columns.names]
        rows = []
        for byte, cells in chunk:
            if not max(indices) < len(cells) <= len(header):
                problem = f"the record has {len(cells)} cells, the header has {len(header)}"
                raise broken(path, line_at(path, byte), f"{problem}; a comma or line break in a text needs quotes")
            row, problem = columns.row_of([cells[index] for index in indices])
            if problem:
                raise wrong_row(path, line_at(path, byte), problem)
            rows.append(row)
        return rows

    def columns(self, path: str) -> tuple[list[str], list[str], list[str]]:
        """A column whose first 1,000 cells are all numbers is a text column only if all columns are."""
        header = self._header(path)
        rows = [cells for _, cells in islice(self._records(path, 0), 1, 1001)]
        texts = [n for i, n in enumerate(header) if not all(_is_number(cells[i]) for cells in rows if i < len(cells))]
        return header, texts or header, []

    def num_rows(self, path: str) -> int:
        return sum(1 for _ in self._records(path, 0)) - bool(self._header(path))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _only_index(path: str, header: list[str], column: str) -> int:
    if header.count(column) > 1:
        raise broken(path, "", f"it has {header.count(column)} columns that are named {column!r}")
    return header.index(column)


class Parquet:
    """A parquet file. Only the columns that hold the rows are read."""

    @contextlib.contextmanager
    def _open(self, path: str) -> Iterator[Any]:
        import pyarrow.parquet  # only here: the import takes a while

        with reading(path, pyarrow.ArrowException), open_file(path) as file:
            # small buffer, no reading ahead: memory does not depend on the size of the file's row groups
            yield pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)

    def chunks(self, path: str, place: int, size: int, columns: RowColumns) -> Iterator[tuple[int, list[Any]]]:
        with self._open(path) as file:
            for name in columns.names:
                _only_index(path, file.schema_arrow.names, name)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            first, row = 0, 0  # of the row group that holds the place
            while first < len(sizes) and row + sizes[first] <= place:
                row, first = row + sizes[first], first + 1
            chunk, length = [], 0
            groups = list(range(first, len(sizes)))
            for batch in file.iter_batches(100, row_groups=groups, columns=[*columns.names], use_threads=False):
                cells = [batch.column(batch.schema.get_field_index(name)).to_pylist() for name in columns.names]
                for values in zip(*cells, strict=True):
                    row += 1
                    if row > place:
                        chunk.append(values)
                        length += num_characters(values)
                    if length >= size:
                        yield place, chunk
                        place, chunk, length = row, [], 0
            if chunk:
                yield place, chunk

    def texts(self, path: str, place: int, chunk: list[tuple[Any, ...]], columns: RowColumns) -> list[Row]:
        rows = []
        for number, values in enumerate(chunk, start=place + 1):
            row, problem = columns.row_of(values)
            if problem:
                raise wrong_row(path, f"row {number:,}", problem)
            rows.append(row)
        return rows

    def columns(self, path: str) -> tuple[list[str], list[str], list[str]]:
        from pyarrow import types

        with self._open(path) as file:
            schema = file.schema_arrow
        texts, chats = [], []
        for field in schema:
            kind = field.type.value_type if types.is_dictionary(field.type) else field.type
            if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
                texts.append(field.name)
            elif (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type):
                chats.append(field.name)
        return texts + chats, texts, chats

    def num_rows(self, path: str) -> int:
        with self._open(path) as file:
            return file.metadata.num_rows
