"""Files and folders that are whole or not there, at whatever instant a process is killed.

A file is written beside its place and renamed. A checkpoint's folder, which must outlive the machine's power too, is
flushed to the disk before that, its manifest last. What is to be removed is renamed first.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path


def write_whole(path, text):
    """Writes `text` beside `path` first, then renames: a reader never finds half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def flush(path):
    """Waits until a file's or a folder's content is on the disk."""
    on_windows = sys.platform == "win32"
    if on_windows and path.is_dir():  # it opens no folders; its NTFS keeps a journal of names
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flushed(path):
    """The manifest's entry for a file, when that is on the disk."""
    flush(path)
    return {"size": path.stat().st_size, "blake2b": digest_of_file(path)}


def write_manifest(folder, entries, files):
    """Writes the manifest of a checkpoint that is complete but for it. `files`: {name: what `flushed` gave}."""
    manifest = {**entries, "files": files}
    manifest["blake2b"] = digest_of_manifest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    flush(folder / "manifest.json")
    flush(folder)


def put_in_place(partial):
    """Renames a folder `step-000500.partial` to what it is to be called."""
    final = partial.with_suffix("")
    if final.exists():  # left from a run that went another way; no promise is on it
        discard(final)
    os.rename(partial, final)
    flush(final.parent)


def discard(path):
    """Renames a checkpoint that will be removed: a kill while its files go leaves nothing that looks like one."""
    discarded = path.with_name(f"{path.name}.discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    os.rename(path, discarded)


def name_of(step):
    return f"step-{step:06d}"


def steps_in(folder):
    """The steps of the checkpoints in a folder, oldest first, whole or not."""
    matches = [re.fullmatch(r"step-(\d{6,})", path.name) for path in folder.glob("step-*")]
    return sorted(int(match[1]) for match in matches if match)


def manifest_of(path):
    """The manifest of a checkpoint, not verified; {} if it cannot be read."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return manifest if isinstance(manifest, dict) else {}
    except (OSError, ValueError):
        return {}


def damage(path):
    """Why the folder `path` is no whole checkpoint, or None. Reads every file."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["blake2b"] != digest_of_manifest(manifest):
            return "manifest.json is not as it was written"
        for name, entry in manifest["files"].items():
            if (path / name).stat().st_size != entry["size"]:
                return f"{name} has {(path / name).stat().st_size:,} bytes instead of {entry['size']:,}"
            if digest_of_file(path / name) != entry["blake2b"]:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {type(error).__name__}"
    return None


def digest_of_file(path):
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of_manifest(manifest):
    rest = {name: value for name, value in manifest.items() if name != "blake2b"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()
