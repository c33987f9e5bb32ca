"""The folder that a run leaves: looked at before anything slow, made when model and data are known to be good, and
finished when its last file, all_results.json, is there."""

import json
import os
import shutil
from pathlib import Path

from train_loop.checkpoint import write_whole
from train_loop.errors import UserError
from train_loop.settings import as_recipe
from train_loop.version import code_version


def check_output_dir(settings):
    """Raises UserError where output_dir cannot take a new run. Changes nothing."""
    if not settings.output_dir:
        return
    path = Path(settings.output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file")
    is_run = (path / "train_config.yaml").is_file()
    resuming = settings.resume_from_checkpoint and is_run
    if path.is_dir() and any(path.iterdir()) and not settings.overwrite_output_dir and not resuming:
        way_on = "--resume_from_checkpoint auto to go on with the run in it, or " if is_run else ""
        raise UserError(
            f"output_dir {path} is not empty: choose another, or give {way_on}--overwrite_output_dir to delete what "
            "is in it"
        )
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        raise UserError(f"output_dir {path} cannot be written: no permission in {place}")


def create_output_dir(settings, resuming=False):
    """output_dir with the settings in it, and empty but for them unless `resuming`. Called once the model and the data
    are known to be good."""
    path = Path(settings.output_dir)
    if settings.resume_from_checkpoint and not resuming:  # what a run left that was killed before its first checkpoint
        (path / "metrics.jsonl").unlink(missing_ok=True)
    if settings.overwrite_output_dir and path.is_dir():
        for entry in path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {path} cannot be made: {error.strerror}") from error
    write_whole(path / "train_config.yaml", f"# written by train_loop {code_version()}\n{as_recipe(settings)}")


def write_results(output_dir, results):
    """all_results.json, which says that a run is finished, or what an evaluation gave."""
    results = {**results, "train_loop": code_version()}
    write_whole(Path(output_dir) / "all_results.json", json.dumps(results, indent=2) + "\n")


def is_finished(output_dir, step=None):
    """Whether the run in `output_dir` was exported, with `step` as its last step if that is given."""
    try:
        results = json.loads((Path(output_dir) / "all_results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return step is None or results.get("step") == step
