"""Folders of checkpoints that are either complete or absent, at whatever instant a process is killed.

A checkpoint must survive a power cut too: it is flushed to the disk, its manifest last, and then renamed. A folder that
is to be removed is renamed first.
"""

import hashlib
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import IO, Any

from train_loop.errors import UserError
from train_loop.whole import read_object, remove


def flush(path: Path) -> None:
    """Waits until a file's or a folder's content is on the disk."""
    on_windows = sys.platform == "win32"
    if on_windows and path.is_dir():  # Windows cannot open folders; NTFS keeps a journal of names
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flushed(path: Path) -> dict:
    """Flushes a file to the disk and returns its entry for the manifest."""
    flush(path)
    return {"size": path.stat().st_size, "blake2b": digest_of_file(path)}


def write_manifest(folder: Path, entries: dict, files: dict) -> None:
    """Writes the manifest, the last file of a checkpoint. `files`: {name: what `flushed` returned}."""
    manifest = {**entries, "files": files}
    manifest["blake2b"] = digest_of_manifest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    flush(folder / "manifest.json")
    flush(folder)


def put_in_place(partial: Path) -> None:
    """Renames a folder `step-000500.partial` to `step-000500`."""
    final = partial.with_suffix("")
    if final.exists():  # left by an earlier run that continued differently; it may go
        discard(final)
    os.rename(partial, final)
    flush(final.parent)


def discard(path: Path) -> None:
    """Renames a checkpoint that will be removed: if a kill comes in the middle, the rest does not look like a
    checkpoint."""
    discarded = path.with_name(f"{path.name}.discarded")
    remove(discarded)
    os.rename(path, discarded)


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of each checkpoint in `folder`, oldest first, complete or damaged. The step comes from the manifest
    if that can be read, because a folder may have been renamed."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted((manifest_of(path).get("step", int(path.name.removeprefix("step-"))), path) for path in paths)


def has_checkpoints(folder: Path) -> bool:
    """Whether a run saved something in `folder` whose manifest can be read."""
    return any(manifest_of(path) for _, path in checkpoints_in(folder))


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, oldest first, complete or damaged."""
    return [step for step, _ in checkpoints_in(folder)]


def steps_to_keep(folder: Path, limit: int | None) -> set[int]:
    """The steps of the checkpoints to keep: the `limit` newest in `folder` (None: all), the best one that each of them
    refers to, and the best of all."""
    manifests = {step: manifest_of(path) for step, path in checkpoints_in(folder)}
    losses = {step: manifest.get("eval_loss") for step, manifest in manifests.items()}
    best = [(loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    newest = sorted(manifests)[-limit:] if limit else list(manifests)
    kept = {*newest, *(manifests[step].get("best_step") for step in newest), *(step for _, step in sorted(best)[:1])}
    return {step for step in kept if step is not None}


def manifest_of(path: Path) -> dict:
    """The manifest of a checkpoint; {} if it is missing or damaged. The other files are not read."""
    try:
        return _verified_manifest(path)
    except (UserError, OSError):
        return {}


def _verified_manifest(path: Path) -> dict:
    return verified(read_object(path / "manifest.json"))


def verified(manifest: Any) -> dict:
    """`manifest` itself. Raises UserError if it is not as `write_manifest` wrote it."""
    if not isinstance(manifest, dict) or manifest.get("blake2b") != digest_of_manifest(manifest):
        raise UserError("manifest.json is not as it was written")
    optional = [manifest.get(name) for name in ("eval_loss", "best_step")]
    numbers = all(value is None or type(value) in (int, float) for value in optional)
    if type(manifest.get("step")) is not int or not isinstance(manifest.get("files"), dict) or not numbers:
        raise UserError("manifest.json is not of this version")
    return manifest


def damage(path: Path) -> str | None:
    """Why the folder `path` is not a complete checkpoint, or None. Reads every file that the manifest names."""
    try:
        return damage_of_files(path, _verified_manifest(path)["files"])
    except FileNotFoundError:
        return "manifest.json is missing" if path.exists() else "there is no such folder"
    except UserError as error:
        return str(error)


def damage_of_files(folder: Path, files: dict) -> str | None:
    """What is wrong with the first of `files`, {name: size and digest}, that is not in `folder` as it was written; None
    if all are. Reads every file."""
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size:,} bytes instead of {entry['size']:,}"
            if digest_of_file(folder / name) != entry["blake2b"]:
                return f"{name} is not as it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        except (KeyError, TypeError, ValueError):
            return f"the size and digest of {name} cannot be read"
    return None


def digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return digest_of(file)


def digest_of(file: IO[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    while chunk := file.read(1 << 22):
        digest.update(chunk)
    return digest.hexdigest()


def digest_of_manifest(manifest: dict) -> str:
    rest = {name: value for name, value in manifest.items() if name != "blake2b"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()
