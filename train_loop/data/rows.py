"""The rows of a run, from files, a folder, a data set of the hub, or Python itself. A row is a line of a text file,
with its newline, or one file of a folder.
"""

from dataclasses import replace
from pathlib import Path

from train_loop.data.row_files import Rows, rows_of_files, warn_of_left_out
from train_loop.errors import UserError
from train_loop.files import data_files
from train_loop.settings import Settings


def load_rows(settings: Settings, validation: Rows | None = None) -> tuple[Rows | None, Rows, str]:
    """(training rows, validation rows, note) of one source. Training rows are None when only evaluating a validation
    file. If `validation` is given, it is the validation rows. The note says where held-out rows come from.

    Raises UserError if the data cannot be found or read, has no text column, or is empty.
    """
    if settings.dataset_name == "python_docs":
        from pydoc_data.topics import topics  # the language reference's help texts: prose, and in every Python

        splits = {"train": Rows.of([topics[name] for name in sorted(topics)])}
    elif settings.dataset_name:
        from train_loop.data.sets import prepared_splits  # only here: importing `datasets` takes a second

        splits = prepared_splits(settings)
    else:
        files = {"train": settings.train_file, "validation": settings.validation_file}
        splits = {split: load_file(str(path), settings) for split, path in files.items() if path}
    train, validation = splits.get("train"), validation or splits.get("validation", splits.get("test"))
    if train is None and not (settings.eval_only and validation is not None):
        raise UserError(f"{settings.dataset_name} has no split 'train'; it has {', '.join(splits)}")
    note = ""
    if validation is None:
        assert train is not None  # else there is a validation split
        num_held_out = max(1, len(train) * settings.validation_split_percentage // 100)
        if num_held_out >= len(train):
            raise UserError(f"{len(train)} training row(s): too few to hold out some; give validation_file")
        note = f"the last {num_held_out:,} of {len(train):,} training rows (validation_split_percentage)"
        validation = replace(train, span=train.span[-num_held_out:])
        train = replace(train, span=train.span[:-num_held_out])
    return train, validation, note


def load_file(path: Path | str, settings: Settings) -> Rows:
    """The rows of a file, of a folder of text files, or of the files matching a pattern."""
    files = data_files(path)
    warn_of_left_out(path, files)
    return rows_of_files(files.paths, settings, files.each_is_a_row)
