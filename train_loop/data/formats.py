"""Which format a file has."""

from train_loop.data.json_files import JsonArray, JsonLines
from train_loop.data.tables import Csv, Parquet
from train_loop.data.text_files import BOM, Documents, Format, Lines, reading
from train_loop.errors import UserError
from train_loop.files import file_kind, open_file


def format_of(path: str, each_file_is_a_row: bool = False, streamed: bool = False) -> Format:
    """The format of a file, by its extension. A .json file is one array, or has one value per line like .jsonl."""
    kind = file_kind(path)
    if kind == "text":
        return Documents() if each_file_is_a_row else Lines()
    if kind == "json":
        is_array = _first_byte(path) == b"["
        if is_array and streamed:
            raise UserError(f"{path} is one JSON array; streaming reads JSON of one object a line")
        return JsonArray() if is_array else JsonLines()
    return Csv() if kind == "csv" else Parquet()


def _first_byte(path: str) -> bytes:
    """The first byte of a file that is neither white space nor a byte-order mark."""
    with reading(path), open_file(path) as file:
        beginning = file.read(len(BOM))
        while beginning and not (rest := beginning.removeprefix(BOM).lstrip()):
            beginning = file.read(1 << 10)
        return rest[:1] if beginning else b""
