"""The folder that a run leaves. It is locked and checked before anything slow, and created when model and data are
known to be good. The run is finished when the last file, all_results.json, is there and the exported files are as it
says."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from train_loop import lock
from train_loop.checkpoint import has_checkpoints
from train_loop.errors import UserError, tell
from train_loop.lora import ADAPTER
from train_loop.process import code_version
from train_loop.publish import EXPORT_PARTIAL, damage_of_export
from train_loop.report import BLOCK_NATS
from train_loop.settings import Settings, as_recipe, sources_of, validation_sets_of
from train_loop.whole import cannot_be_written, partial_of, read_object, remove, utf8, write_whole

MARK = "train_config.yaml"  # written first in a run's folder, and removed last
RECORDS = ("metrics.jsonl", "all_results.json", "loss_curve.png")
PARTIALS = [partial_of(Path(name)).name for name in (MARK, *RECORDS)] + [EXPORT_PARTIAL]
# what `from_pretrained` reads; used where no all_results.json says what was exported
EXPORTED = (
    r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|tokenizer\.(json|model)|"
    r"(tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|chat_template\.jinja|spiece\.model"
)
EXPORTED = rf"{EXPORTED}|{ADAPTER}/({EXPORTED}|adapter_config\.json|adapter_model\.safetensors)"

CHECKPOINT = r"step-\d{6,}(\.partial|\.discarded)?|pushed"


@contextlib.contextmanager
def held(settings: Settings, accelerator: Accelerator) -> Iterator[None]:
    """Holds the lock of output_dir on the main process for as long as the run lives. Call it on every process.

    Raises UserError on all processes if another run holds the lock, or if output_dir cannot be used for this run. Then
    nothing in it is changed.
    """
    with contextlib.ExitStack() as at_the_end:
        problem = None
        if accelerator.is_main_process:
            try:
                path = Path(settings.output_dir) if settings.output_dir and not settings.dry_run else None
                if path is None or not (path / lock.NAME).exists():  # a living run is reported first
                    check_output_dir(settings)
                if path is not None:
                    at_the_end.enter_context(_locked(path))
                    check_output_dir(settings)  # again: a run may have ended in between
            except UserError as error:
                problem = str(error)
        if problem := broadcast_object_list([problem])[0]:
            raise UserError(problem)
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as at_the_end:
        try:
            at_the_end.enter_context(lock.held(path))
        except OSError as error:
            raise cannot_be_written(f"output_dir {path}", error) from error
        yield


def check_output_dir(settings: Settings) -> None:
    """Raises UserError if output_dir cannot be used for this run. Changes nothing."""
    if not settings.output_dir:
        return
    path = Path(settings.output_dir)
    if (name := utf8(str(path.absolute())).decode()) != str(path.absolute()):
        raise UserError(
            f"output_dir {name} is not UTF-8, and safetensors cannot read such a folder: choose another name"
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file: choose another name")
    is_run = (path / MARK).is_file() or has_checkpoints(path / "checkpoints")
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {path} cannot be written: no permission in {place}")
    if not path.is_dir() or all(entry.name in (lock.NAME, *PARTIALS) for entry in path.iterdir()):
        return
    if settings.overwrite_output_dir:
        if not is_run:
            raise UserError(
                f"output_dir {path} is not empty, and there is no {MARK} in it, so it is not the folder of a run. "
                "--overwrite_output_dir deletes only what a run left: choose a different output_dir"
            )
        if found := next(_inputs_in(path, settings), None):
            name, inside = found
            raise UserError(
                f"{name} {inside} is in output_dir {path}, which --overwrite_output_dir would delete: choose a "
                "different output_dir"
            )
    elif not (settings.resume_from_checkpoint and is_run):
        way_on = (
            ", or resume the run in it with --resume_from_checkpoint auto, or delete it with --overwrite_output_dir"
        )
        raise UserError(f"output_dir {path} is not empty: choose a different one{way_on if is_run else ''}")


def _inputs_in(path: Path, settings: Settings) -> Iterator[tuple[str, str]]:
    """(setting, path) of each input of the run that is `path` itself or lies in it."""
    names = ("model_name_or_path", "config_name", "tokenizer_name")
    inputs = [(name, getattr(settings, name)) for name in names]
    for source in sources_of(settings).values():
        inputs += [("train_file", source.train_file), ("dataset_name", source.dataset_name)]
    inputs += [("validation_file", one.validation_file) for one in validation_sets_of(settings).values()]
    for name, value in inputs:
        if value and path.resolve() in (Path(value).resolve(), *Path(value).resolve().parents):
            yield name, value


def create_output_dir(settings: Settings, resuming: bool = False) -> None:
    """Creates output_dir and writes the settings into it. Unless `resuming`, nothing of an earlier run stays. Call it
    once the model and the data are known to be good. Raises UserError if the folder cannot be written."""
    path = settings.folder
    try:
        path.mkdir(parents=True, exist_ok=True)
        exported = _results_in(path).get("exported") if settings.overwrite_output_dir else None
        (path / "all_results.json").unlink(missing_ok=True)  # from here on the run is not finished
        for name in PARTIALS:  # of a run that was killed
            remove(path / name)
        if settings.overwrite_output_dir:
            _overwrite(path, set(exported) if isinstance(exported, dict) else set())
        elif not resuming:  # left by a run that was killed before its first checkpoint
            (path / "metrics.jsonl").unlink(missing_ok=True)
            (path / BLOCK_NATS).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_be_written(f"output_dir {path}", error) from error
    write_whole(path / MARK, f"# written by train_loop {code_version()}\n{as_recipe(settings)}")


def _overwrite(path: Path, exported: set[str]) -> None:
    """Removes what a run makes, except train_config.yaml, and says what stays. `exported`: names of the model's
    files."""
    for checkpoint in path.glob("checkpoints/*"):
        if re.fullmatch(CHECKPOINT, checkpoint.name):
            remove(checkpoint)
    for file in (BLOCK_NATS, partial_of(BLOCK_NATS)):
        remove(path / file)
    for folder in ("checkpoints", BLOCK_NATS.parent.name):
        with contextlib.suppress(OSError):  # it is missing, or something else is in it
            (path / folder).rmdir()
    for entry in [*path.glob(f"{ADAPTER}/*"), *path.iterdir()]:
        name = entry.relative_to(path).as_posix()
        is_exported = name in exported if exported else re.fullmatch(EXPORTED, name)
        if is_exported or name in {*RECORDS, "README.md", "tensorboard"}:
            remove(entry)
    with contextlib.suppress(OSError):  # likewise
        (path / ADAPTER).rmdir()
    if foreign := sorted(entry.name for entry in path.iterdir() if entry.name not in (MARK, lock.NAME)):
        tell(f"files in {path} that no run made are kept: {', '.join(foreign)}")


def write_results(folder: Path, results: dict) -> None:
    """Writes all_results.json: the results of a finished run, or of an evaluation. Raises UserError."""
    results = {**results, "train_loop": code_version()}
    write_whole(folder / "all_results.json", json.dumps(results, indent=2) + "\n")


def finished_step(settings: Settings, accelerator: Accelerator) -> tuple[int | None, str | None]:
    """(last step, damage of the exported files) of a finished run in output_dir that is to be resumed. The step is None
    if no finished run is there, the damage None if there is none. Call it on every process; all get the same."""
    step = damage = None
    if accelerator.is_main_process and settings.resume_from_checkpoint:
        results = _results_in(settings.folder)
        if isinstance(results.get("step"), int):
            step, damage = results["step"], damage_of_export(settings.folder)
    return tuple(broadcast_object_list([step, damage]))


def _results_in(path: Path) -> dict[str, Any]:
    """The content of all_results.json; {} if it is missing or damaged."""
    try:
        return read_object(path / "all_results.json")
    except FileNotFoundError:
        return {}
    except UserError as error:
        tell(f"{error}. So the run does not count as finished")
        return {}
