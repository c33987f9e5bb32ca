"""Files of text: the kind of a file, and the files that a folder or a pattern stands for."""

import glob
import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class DataFiles:
    """The files that `train_file` or `validation_file` means."""

    paths: list[Path]
    each_is_a_row: bool = False  # text files of a folder or a pattern
    num_left_out: int = 0  # files of the folder or the pattern that are of another kind


def file_kind(path: Path | str) -> str | None:
    """The kind of a file by its extension, without a final .gz; None if the kind is unknown."""
    path = Path(path)
    return FILE_KINDS.get((path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower())


def data_files(path: Path | str) -> DataFiles:
    """A file stands for itself; a folder for the text files in it, at any depth; a pattern with a *, such as
    texts/**/*.txt, for the files that match it. They are sorted by path. Hidden files are left out. A file that several
    links lead to comes once."""
    path = Path(path)
    if path.is_file() or not (path.is_dir() or "*" in str(path)):
        return DataFiles([path])
    pattern = f"{glob.escape(str(path))}/**" if path.is_dir() else str(path)
    found = [file for file in map(Path, glob.glob(pattern, recursive=True)) if file.is_file()]
    found.sort(key=lambda file: (len(file.parts), file))  # a link into a folder above comes after what it leads to
    found = sorted({file.resolve(): file for file in reversed(found)}.values())
    paths = [file for file in found if (file_kind(file) == "text" if path.is_dir() else file_kind(file))]
    is_text = bool(paths) and all(file_kind(file) == "text" for file in paths)
    return DataFiles(paths, is_text, len(found) - len(paths))


def open_file(path: Path | str) -> Any:
    """The content of a file, or of a file on the hub ("hf://..."), unpacked, as a binary file to read."""
    path = str(path)
    if not path.startswith("hf://"):
        return gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")
    from huggingface_hub import HfFileSystem  # imported only here: it takes a while

    file = HfFileSystem().open(path, "rb")
    return gzip.open(file) if path.lower().endswith(".gz") else file
