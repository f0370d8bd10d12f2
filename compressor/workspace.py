"""The workspace: content-addressed stage artefacts, published by one rename, under one lock.

Layout::

    <workspace>/lock                     held (flock) by the one run that may write
    <workspace>/stages/<name>-<key>/     a finished artefact; its ``stage.json`` was written last
    <workspace>/partial/<name>-<key>/    a stage under way; finished pieces inside are kept on resume

``key = sha256(stage name, version, its spec, keys of what it needs)``: the same work is never done twice, and
any change of recipe, source or code version gets a new folder. A killed run leaves only ``partial`` folders
and ``*.tmp-*`` files, both safe to meet again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import UserError

STAGE_FILE = "stage.json"
_KEY_LENGTH = 20
_CHUNK_BYTES = 8 << 20


def stage_key(name: str, version: int, spec: Mapping[str, Any], needs: Sequence[str]) -> str:
    """Hex key of a stage; ``spec`` must be JSON-able and hold everything that its result depends on."""
    text = json.dumps([name, version, spec, list(needs)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Writes ``path`` by temp file, fsync and rename: a reader sees the old bytes or the new."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


# Of a draft model's folder.
DRAFT_RESULT = "result"


@dataclass(frozen=True)
class Entry:
    """One artefact as ``compress clean`` lists it."""

    path: Path
    nbytes: int
    finished: bool
    modified: float


class Workspace:
    """One folder of artefacts. Reading needs no lock; every writer holds it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stages = root / "stages"
        self.partials = root / "partial"
        self.hub = root / "hub"
        self.drafts = root / "draft"
        self.answers = root / "answers"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the workspace for this process; the system frees it when the process dies, however it dies.

        Raises:
            UserError: another run holds it, or the folder cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / "lock").open("a+")
        except OSError as error:
            raise UserError(
                f"the workspace cannot be written: {error.strerror}",
                where=str(self.root),
                fix="name another folder with --workspace",
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                holder = lock.read(32).strip() or "unknown"
                raise UserError(
                    f"another run (process {holder}) is using this workspace",
                    where=str(self.root),
                    fix="wait for it, stop it, or name another folder with --workspace",
                ) from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Removes temporary files of killed runs; only called under the lock, so their owners are dead."""
        for folder in (self.stages, self.partials):
            if folder.is_dir():
                for path in folder.rglob("*.tmp-*"):
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
        if self.hub.is_dir():
            # huggingface_hub names each try anew, so that none is gone on with.
            for path in self.hub.rglob("*.incomplete"):
                path.unlink()

    def artefact(self, name: str, key: str) -> Path:
        """Where the finished artefact of a stage is or will be."""
        return self.stages / f"{name}-{key}"

    def finished(self, name: str, key: str) -> bool:
        """Whether the stage is done: its folder exists with the file that is written last."""
        return (self.artefact(name, key) / STAGE_FILE).is_file()

    def begin(self, name: str, key: str) -> Path:
        """The folder to work in; holds what an earlier, interrupted run of the same stage finished."""
        folder = self.partials / f"{name}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def publish(self, name: str, key: str, facts: Mapping[str, Any]) -> Path:
        """Writes ``facts`` into the working folder and renames it to its final place."""
        working = self.partials / f"{name}-{key}"
        write_json(working / STAGE_FILE, dict(facts))
        self.stages.mkdir(parents=True, exist_ok=True)
        final = self.artefact(name, key)
        working.rename(final)
        return final

    def facts(self, name: str, key: str) -> dict[str, Any]:
        """What ``publish`` recorded."""
        loaded: dict[str, Any] = json.loads((self.artefact(name, key) / STAGE_FILE).read_text())
        return loaded

    def discard(self, name: str, key: str) -> None:
        """Forgets a stage, finished or not."""
        for folder in (self.artefact(name, key), self.partials / f"{name}-{key}"):
            if folder.exists():
                shutil.rmtree(folder)

    def entries(self) -> list[Entry]:
        """All artefacts, partial folders, draft models made here, Hub files, kept answers, largest first."""
        found = []
        for parent, finished in ((self.stages, True), (self.partials, False)):
            folders = sorted(parent.iterdir()) if parent.is_dir() else []
            found += [
                self._entry(folder, finished)
                for folder in folders
                if folder.is_dir() and not folder.is_symlink()
            ]
        if self.drafts.is_dir():
            # Each has a workspace of its own, and a result.
            found += [
                self._entry(folder, (folder / DRAFT_RESULT).is_dir())
                for folder in sorted(self.drafts.iterdir())
                if folder.is_dir() and not folder.is_symlink()
            ]
        found += [self._entry(kept, True) for kept in (self.hub, self.answers) if kept.is_dir()]
        return sorted(found, key=lambda entry: -entry.nbytes)

    def reclaimable_bytes(self, entries: Sequence[Entry]) -> int:
        """What deleting these artefacts frees: shards that an export shares stay on the disk with it."""
        names: dict[tuple[int, int], int] = {}
        facts: dict[tuple[int, int], os.stat_result] = {}
        for entry in entries:
            for path in _files(entry.path):
                stat = path.lstat()
                names[stat.st_dev, stat.st_ino] = names.get((stat.st_dev, stat.st_ino), 0) + 1
                facts[stat.st_dev, stat.st_ino] = stat
        return sum(stat.st_size for key, stat in facts.items() if names[key] >= stat.st_nlink)

    @staticmethod
    def _entry(folder: Path, finished: bool) -> Entry:
        stats = [path.lstat() for path in _files(folder)]
        return Entry(
            folder,
            sum(stat.st_size for stat in stats),
            finished,
            max((s.st_mtime for s in stats), default=0.0),
        )


def _files(folder: Path) -> list[Path]:
    """The files below a folder; links are themselves, not what they point to."""
    return [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
