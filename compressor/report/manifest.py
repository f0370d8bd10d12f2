"""``manifest.json``: what the output folder holds, byte for byte, and what it was made from.

``content_sha256`` covers what a second run of the same recipe must reproduce: weights, index, configs,
tokenizer files and recipe. Files that hold times (report, page, card) are listed but not part of it.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.checkpoint.base import Source
from compressor.errors import CheckpointError
from compressor.progress import Progress, Silent
from compressor.report.words import visible
from compressor.workspace import write_json

MANIFEST_FILE = "manifest.json"
RUN_FILES = frozenset({"README.md", "report.json", "report.html", MANIFEST_FILE})
_CHUNK_BYTES = 8_000_000
_MAX_MANIFEST_BYTES = 64 << 20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileFacts(_Record):
    """Hex sha256 and bytes of one file."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class SourceIdentity(_Record):
    """Which source it was: label, Hub revision (or None) and the fingerprint over headers and sizes."""

    label: str
    revision: str | None
    fingerprint: str


class Manifest(_Record):
    """The layout of ``manifest.json``; ``files``: every file but the manifest, by relative POSIX path.

    ``refused``: what the gates have against the result, which is not to be published then.
    """

    schema_version: Literal[1] = 1
    key: str
    source: SourceIdentity
    seed: int
    versions: dict[str, str]
    content_sha256: Sha256
    files: dict[str, FileFacts]
    refused: tuple[str, ...] = ()


def write_manifest(
    folder: Path,
    *,
    key: str,
    source: Source,
    versions: Mapping[str, str],
    seed: int,
    refused: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Manifest:
    """Hashes every file under ``folder`` and writes ``manifest.json`` there; call it last.

    Raises:
        CheckpointError: something in the folder is neither a file nor a folder (a symbolic link, a socket),
            or its name is not UTF-8.
    """
    progress = progress or Silent()
    paths = {name: folder / name for name in sorted(_names(folder)) if name != MANIFEST_FILE}
    progress.start("manifest", sum(path.stat().st_size for path in paths.values()), "bytes")
    files = {
        name: FileFacts(sha256=_hash(path, progress), size=path.stat().st_size)
        for name, path in paths.items()
    }
    progress.finish()
    manifest = Manifest(
        key=key,
        source=SourceIdentity(label=source.label, revision=source.revision, fingerprint=source.fingerprint),
        seed=seed,
        versions=dict(versions),
        content_sha256=content_sha256({name: facts.sha256 for name, facts in files.items()}),
        files=files,
        refused=refused,
    )
    write_json(folder / MANIFEST_FILE, manifest.model_dump())
    return manifest


def content_sha256(hashes: Mapping[str, str]) -> str:
    """Hex sha256 over the JSON list of [name, sha256], sorted by name, of all files but ``RUN_FILES``."""
    pairs = sorted([name, value] for name, value in hashes.items() if name not in RUN_FILES)
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``.

    Raises:
        CheckpointError: there is none, or it is not of this layout.
    """
    path = folder / MANIFEST_FILE
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MAX_MANIFEST_BYTES:
            raise CheckpointError("not an ordinary file of less than 64 MB", where=str(path))
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"no manifest can be read: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "file"
        raise CheckpointError(f"not a manifest: {key}: {first['msg']}", where=str(path)) from None


def check_manifest(folder: Path, *, progress: Progress | None = None) -> list[str]:
    """Every difference between the folder and its manifest, one sentence each; empty if there is none.

    Symbolic links are followed (the Hub's cache is made of them), but a file is read only after its size
    proved right. Hidden files that the manifest does not name (``.gitattributes``, ``.cache``) are no
    difference: the Hub's tools add them and engines do not read them.

    Raises:
        CheckpointError: there is no manifest, or it is not of this layout.
    """
    progress = progress or Silent()
    manifest = read_manifest(folder)
    progress.start("check manifest", sum(facts.size for facts in manifest.files.values()), "bytes")
    found = [_difference(folder, name, facts, progress) for name, facts in manifest.files.items()]
    progress.finish()
    differences = [difference for difference in found if difference is not None]
    listed = content_sha256({name: facts.sha256 for name, facts in manifest.files.items()})
    if listed != manifest.content_sha256:
        differences.append(f"{MANIFEST_FILE}: content_sha256 does not follow from the files listed")
    differences += [
        f"{visible(name)}: not in the manifest"
        for name in sorted(_present(folder) - manifest.files.keys() - {MANIFEST_FILE})
        if not name.startswith(".")
    ]
    return differences


def _difference(folder: Path, name: str, facts: FileFacts, progress: Progress) -> str | None:
    relative = PurePosixPath(name)
    shown = visible(name)
    if relative.is_absolute() or not relative.parts or ".." in relative.parts:
        return f"{shown}: names no file of this folder"
    path = folder / relative
    try:
        if not path.is_file():
            return f"{shown}: missing"
        size = path.stat().st_size
        if size != facts.size:
            return f"{shown}: {size:,} bytes instead of {facts.size:,}"
        if _hash(path, progress) != facts.sha256:
            return f"{shown}: other content (sha256)"
    except OSError as error:
        return f"{shown}: cannot be read ({error.strerror})"
    return None


def _hash(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress.advance(len(chunk), path.name)
    return digest.hexdigest()


def _names(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        name = path.relative_to(folder).as_posix()
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CheckpointError("neither a file nor a folder", where=visible(str(path)), fix="remove it")
        if name.encode(errors="replace").decode() != name:
            raise CheckpointError("its name is not UTF-8", where=visible(str(path)), fix="rename it")
        if stat.S_ISREG(mode):
            yield name


def _present(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
