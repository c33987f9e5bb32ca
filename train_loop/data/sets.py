"""Data sets of the hub, or in a local folder. `datasets` finds their files and splits. The rows are read from the files
here, so every text is exactly the file's, as with `train_file`. `datasets` reads only what has no files of a known kind
(arrow files, a cache that `datasets` itself filled).
"""

import contextlib
import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets

from train_loop.data.row_files import Rows, cache_folder, digest_of, only_text, rows_of_files
from train_loop.errors import UserError, one_line
from train_loop.files import file_kind
from train_loop.hub import hub_address
from train_loop.settings import Settings

KINDS = ("text", "json", "csv", "parquet")  # names of builders of `datasets`
OF_NO_CONCERN = (
    "name",
    "version",
    "data_dir",
    "data_files",
    "description",
    "features",
    "sep",
    "delimiter",
    "chunksize",
)


def find_data_set(settings: Settings) -> tuple[Any, dict[str, list[str]] | None]:
    """(builder of `datasets`, {split: its files}). The files are None if `datasets` must read them. The builder is
    None if the hub cannot be reached and an earlier run has downloaded the files.

    Raises UserError if there is no such data set, or if reading would change its text.
    """
    name, config, builder = settings.dataset_name, settings.dataset_config_name, None
    try:
        builder = datasets.load_dataset_builder(name, config)
    except Exception as error:  # the loader's errors have no common class
        problem = error
    if (builder is None or builder.name == "cache") and (files := _downloaded_earlier(settings)):
        return None, files
    if builder is None:
        raise UserError(
            f"data set {name}{f' ({config})' if config else ''} cannot be loaded: {one_line(problem)}. It was looked "
            f"for as a folder here, in the cache ({cache_folder()}), and on {hub_address()}. "
            "Without the hub: fill the cache on a machine that reaches it and set HF_HUB_OFFLINE=1, or give train_file "
            "and validation_file"
        ) from problem
    if builder.name not in KINDS:
        if builder.info.builder_name in ("text", "csv"):
            raise UserError(
                f"data set {name} is in the cache as `datasets` reads it: without line breaks, or with cells that are "
                "null or numbers. Run once where the hub can be reached"
            )
        return builder, None
    files = {str(split): [str(path) for path in paths] for split, paths in builder.config.data_files.items()}
    plain, config = type(builder.config)(), builder.config
    options = [
        field.name
        for field in fields(config)
        if field.name not in OF_NO_CONCERN and getattr(config, field.name) != getattr(plain, field.name)
    ]
    delimiters = {"\t" if ".tsv" in path.lower() else "," for paths in files.values() for path in paths}
    if builder.name == "csv" and {config.delimiter or config.sep} != delimiters:
        options.append("sep")
    known = all(file_kind(path) == builder.name for paths in files.values() for path in paths)
    if known and not options:
        return builder, files
    if builder.name == "parquet":
        return builder, None
    reason = f"its card asks for {', '.join(options)}" if options else "the format of its files is not supported"
    raise UserError(f"data set {name} cannot be read: {reason}. Convert it to jsonl or parquet")


def prepared_splits(settings: Settings) -> dict[str, Rows]:
    """The rows of the settings' data set: of its split "train", and of "validation" or else "test"."""
    builder, files = find_data_set(settings)
    if files is None:
        builder.download_and_prepare()
        splits = {str(name): rows for name, rows in builder.as_dataset().items()}
    else:
        splits = files
    held_out = [name for name in ("validation", "test") if name in splits]
    names = [name for name in ("train", *held_out[:1]) if name in splits] or list(splits)
    if files is None:
        return {name: only_text(splits[name], settings) for name in names}
    if builder is not None and any("://" in path for name in names for path in files[name]):
        files = {name: [_download(path) for path in files[name]] for name in names}
        _remember(settings, files)
    return {name: rows_of_files(files[name], settings) for name in names}


def _download(path: str) -> str:
    """The path in the hub's cache of hf://datasets/OWNER/NAME@REVISION/FILE."""
    if not (parts := re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", path)):
        raise UserError(f"{path} cannot be read: it is not on the hub")
    from huggingface_hub import hf_hub_download

    repository, revision, name = parts.groups()
    return hf_hub_download(repository, name, repo_type="dataset", revision=unquote(revision))


def _index(settings: Settings) -> Path:
    key = digest_of([settings.dataset_name, settings.dataset_config_name])
    return cache_folder() / "train_loop" / "data_sets" / f"{key}.json"


def _remember(settings: Settings, files: dict[str, list[str]]) -> None:
    """Saves the paths for a run without the hub. An unwritable cache is not an error here."""
    path = _index(settings)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(files), encoding="utf-8")
        os.replace(partial, path)


def _downloaded_earlier(settings: Settings) -> dict[str, list[str]] | None:
    try:
        files = json.loads(_index(settings).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return files if all(os.path.isfile(path) for paths in files.values() for path in paths) else None
