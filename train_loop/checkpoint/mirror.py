"""Copies of complete checkpoints in a different place: a disk, or any store that fsspec knows (s3://, gs://, sftp://,
...).

    ADDRESS/step-000500/    the files of the checkpoint; the manifest comes last, and a copy without it does not count

The store need not support renaming. While a copy is being made, an empty file `unfinished` lies beside its files.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_loop.checkpoint.durable import (
    damage,
    digest_of,
    manifest_of,
    name_of,
    put_in_place,
    verified,
)
from train_loop.errors import UserError, one_line, tell, warn, with_line
from train_loop.whole import remove

WAIT_SECONDS, WAIT_BYTES_PER_SECOND = 60, 10_000_000  # at its end a run waits at most this long for a copy


class Mirror:
    """The copies of one run's checkpoints at `address`. Only the main process has one.

    `folder`: where the run's own checkpoints are. `refusal`: takes the content of a state.json and returns why this run
    cannot resume from it, or None. A mirror that fails is a warning: training continues and does not wait.
    """

    def __init__(self, address: str, folder: Path, refusal: Callable[[dict[str, Any]], str | None]) -> None:
        self.address, self.folder, self.refusal = address, folder, refusal
        self.path: Path | None = None  # the checkpoint that is being copied, or was copied last
        self.thread: threading.Thread | None = None
        self.resumed = False  # if so, newer copies come from steps that are run anew
        self.is_off = False

    def is_reading(self, path: Path) -> bool:
        return path == self.path and self._is_busy()

    def _is_busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def begin(self, path: Path, kept: set[str]) -> None:
        """Starts to copy the checkpoint `path` in the background, and then to remove older copies, except those in
        `kept`. Skips it, with a warning, while the copy before it is being made."""
        if self.is_off:
            return
        if self.path is not None and self._is_busy():
            return warn(f"{path.name} is not mirrored: the copy of {self.path.name} is still being made")
        self.path = path
        self.thread = threading.Thread(target=self._run, args=(path, kept), daemon=True)
        self.thread.start()

    def finish(self, latest: Path, kept: set[str]) -> None:
        """Waits until `latest`, the run's last checkpoint, is copied, for a limited time."""
        self._wait()
        if latest != self.path and not self._is_busy():  # it was skipped
            self.begin(latest, kept)
            self._wait()
        if self._is_busy() and self.path is not None:
            warn(f"{self.path.name} is not mirrored to {self.address}: the copy was not done when the run ended")

    def _wait(self) -> None:
        if self.thread is not None and self.path is not None:
            num_bytes = sum(entry["size"] for entry in manifest_of(self.path).get("files", {}).values())
            self.thread.join(WAIT_SECONDS + num_bytes / WAIT_BYTES_PER_SECOND)

    def _run(self, path: Path, kept: set[str]) -> None:
        try:
            self._copy(path, kept)
        except Exception as error:  # each store's library has errors of its own
            warn(f"{path.name} is not mirrored to {self.address}: {with_line(error)}")

    def _open(self) -> None:
        from fsspec.core import url_to_fs  # imported only if asked for: it takes half a second

        self.store, root = url_to_fs(self.address)
        self.root = root.rstrip("/")
        self.store.invalidate_cache()

    def _names(self) -> list[str]:
        try:
            entries = self.store.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        names = [entry.rstrip("/").rpartition("/")[2] for entry in entries]
        return [name for name in names if re.fullmatch(r"step-\d{6,}", name)]

    def _complete(self) -> dict[str, dict]:
        """{name: manifest} of the complete copies, oldest first."""
        found = {}
        for name in self._names():
            with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):  # there is none, or a damaged one
                found[name] = verified(json.loads(self.store.cat_file(f"{self.root}/{name}/manifest.json")))
        return dict(sorted(found.items(), key=lambda item: item[1]["step"]))

    def _state(self, name: str, manifest: dict) -> dict[str, Any] | None:
        """The content of a copy's state.json; None if it is damaged."""
        try:
            content = self.store.cat_file(f"{self.root}/{name}/state.json")
        except FileNotFoundError:
            return None
        entry = manifest["files"].get("state.json")
        is_whole = (
            isinstance(entry, dict) and entry.get("blake2b") == hashlib.blake2b(content, digest_size=16).hexdigest()
        )
        return json.loads(content) if is_whole else None

    def _copy(self, path: Path, kept: set[str]) -> None:
        self._open()
        complete, manifest, target = self._complete(), manifest_of(path), f"{self.root}/{path.name}"
        for name, other in complete.items():
            state = self._state(name, other)
            if state is not None and (reason := self.refusal(state)):
                self.is_off = True  # a copy of a different run would be overwritten or removed
                return warn(f"nothing is mirrored: {self.address}/{name} {reason}. Give --mirror a different address")
        if complete.get(path.name) != manifest:
            self._remove(path.name)
            self.store.makedirs(target, exist_ok=True)
            self.store.pipe_file(f"{target}/unfinished", b"")
            entries = {**manifest["files"], "manifest.json": None}
            for name, entry in entries.items():
                self.store.put_file(str(path / name), f"{target}/{name}")
                if entry and not self._is_as_written(f"{target}/{name}", entry):
                    raise OSError(f"{name} was not stored as it was written")
            self.store.rm_file(f"{target}/unfinished")
            if self._complete().get(path.name) != manifest:
                raise OSError("manifest.json was not stored as it was written")
        for name in set(self._names()) - kept - {path.name}:
            is_older = name in complete and complete[name]["step"] < manifest["step"]
            if is_older or (name in complete and self.resumed) or self.store.exists(f"{self.root}/{name}/unfinished"):
                self._remove(name)

    def _is_as_written(self, address: str, entry: dict) -> bool:
        with self.store.open(address, "rb") as file:
            return self.store.size(address) == entry["size"] and digest_of(file) == entry["blake2b"]

    def _remove(self, name: str) -> None:
        """Removes a copy, its manifest first: if this is interrupted, the rest does not count as a copy."""
        for address in (f"{self.root}/{name}/manifest.json", f"{self.root}/{name}"):
            with contextlib.suppress(FileNotFoundError):
                self.store.rm(address, recursive=True)

    def fetch(self) -> Path | None:
        """Copies the newest complete checkpoint of the mirror to the run's folder, with the best one that it refers to.
        Returns its path, or None if there is none. Raises UserError if the run must not resume from it."""
        try:
            self._open()
            complete = self._complete()
            for name, manifest in reversed(complete.items()):
                state = self._state(name, manifest)
                if state is not None and (reason := self.refusal(state)):
                    raise UserError(f"{self.address}/{name} {reason}")
                path = self._download(name, manifest)
                if path is None:
                    continue
                best = name_of(manifest.get("best_step") or 0)
                if best in complete and best != name:
                    self._download(best, complete[best])
                return path
        except UserError:
            raise
        except Exception as error:  # as above
            warn(f"the mirror {self.address} cannot be read, so nothing is resumed from it: {with_line(error)}")
        return None

    def _download(self, name: str, manifest: dict) -> Path | None:
        """The path of the fetched checkpoint; None if the copy is damaged."""
        partial = self.folder / f"{name}.partial"
        remove(partial)
        partial.mkdir(parents=True)
        try:
            for file in [*manifest["files"], "manifest.json"]:
                if not re.fullmatch(r"\w[\w.-]*", file):  # such a name could lead out of the folder
                    raise FileNotFoundError(file)
                self.store.get_file(f"{self.root}/{name}/{file}", str(partial / file))
            reason = damage(partial)
        except FileNotFoundError as error:
            reason = f"{one_line(error)} is missing"
        if reason:
            remove(partial)
            tell(f"{self.address}/{name} is damaged ({reason}): trying the one before it")
            return None
        put_in_place(partial)
        tell(f"{name} was fetched from the mirror {self.address}")
        return partial.with_suffix("")
