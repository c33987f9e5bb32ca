"""Files of text: of which kind one is, and which ones a folder or a pattern means."""

import glob
import gzip
from pathlib import Path

FILE_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


def file_kind(path):
    """The `datasets` loader for a file, by its ending, a last .gz not counted; None if there is none."""
    path = Path(path)
    return FILE_KINDS.get((path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower())


def text_files(path):
    """The text files that a folder, or a pattern such as texts/**/*.txt, means, sorted by path, hidden ones left out;
    None where `path` is neither."""
    if Path(path).is_file() or not (Path(path).is_dir() or "*" in str(path)):
        return None
    pattern = f"{glob.escape(str(path))}/**" if Path(path).is_dir() else str(path)
    found = map(Path, glob.glob(pattern, recursive=True))
    return sorted(file for file in found if file.is_file() and file_kind(file) == "text")


def train_files(settings):
    """The files to stream: train_file, or the text files that it means as a folder or pattern, or what else fits it."""
    path = Path(settings.train_file)
    if path.is_file():
        return [path]
    return text_files(path) or [Path(p) for p in sorted(glob.glob(str(path)))] or [path]


def open_file(path, mode="rb", **options):
    return (gzip.open if str(path).endswith(".gz") else open)(path, mode, **options)
