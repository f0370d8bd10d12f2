"""A source in a local Hugging Face folder: config.json, one or many safetensors shards, tokenizer files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Kind
from compressor.checkpoint.layout import (
    MAX_JSON_BYTES,
    TEMPLATES_FOLDER,
    card_license,
    fingerprint,
    is_side_file,
    merge_headers,
    parse_config,
    parse_index,
    weight_files,
)
from compressor.checkpoint.modelopt import CONFIG_NAME, with_description
from compressor.checkpoint.safetensors_file import AGAIN, FileHeader, read_header, read_tensor
from compressor.checkpoint.safetensors_writer import INDEX_NAME
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

SAMPLE_BYTES = 512
# Reads for samples, over the whole checkpoint: seconds from a disk that has cached nothing.
MAX_SAMPLES = 30_000


class FolderSource:
    """A local folder; opening reads config.json, the index and the headers, and no weights.

    Attributes as ``Source`` describes them.

    Args:
        folder: where it lies.
        label: how plan and card name it.
        quantized: whether the weights may be quantized; they are read as they lie, and ``config`` says how.

    Raises:
        CheckpointError: whatever makes the folder incomplete, unsafe or unsupported; see ``layout``.
    """

    kind: Kind = "safetensors"
    note = ""
    revision: str | None = None

    def __init__(self, folder: Path, label: str | None = None, *, quantized: bool = False) -> None:
        self._folder = folder.resolve()
        self.label = label or str(folder)
        if not self._folder.is_dir():
            what = "a file, and no folder" if self._folder.is_file() else "no such folder"
            raise CheckpointError(what, where=str(folder), fix="name a checkpoint's folder")
        names = sorted(os.listdir(self._folder))
        if "config.json" not in names:
            weight_files(names, str(folder))
            raise CheckpointError("config.json is missing", where=str(folder))
        self.config: dict[str, Any] = parse_config(
            self._small_file("config.json"), self.label, quantized=quantized
        )
        if quantized and CONFIG_NAME in names:
            self.config = with_description(self.config, self._small_file(CONFIG_NAME), self.label)
        self.license = card_license(self._small_file("README.md")) if "README.md" in names else None
        lead = weight_files(names, self.label)
        weight_map = parse_index(self._small_file(lead), self.label) if lead == INDEX_NAME else {}
        shards = sorted(set(weight_map.values())) or [lead]
        # Taken before anything is read, so that a later change is noticed whenever it happens.
        self._stamps = {shard: file_stamp(self._inside(shard)) for shard in shards}
        files = {shard: read_header(self._inside(shard)) for shard in shards}
        headers, self._homes = merge_headers(files, weight_map, self.label, quantized=quantized)
        self.headers: Mapping[str, TensorHeader] = headers
        self._offsets = {name: offset for file in files.values() for name, offset in file.offsets.items()}
        self._side_files = self._find_side_files(names)
        self.fingerprint = self._fingerprint(files)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """See ``Source.read``."""
        path = self._folder / self._homes[name]
        check_unchanged(path, self._stamps[self._homes[name]])
        return read_tensor(path, self.headers[name], self._offsets[name], index)

    def write_side_files(self, folder: Path) -> list[str]:
        """Copies tokenizer, template, processor, generation and licence files; see ``Source``."""
        for name in self._side_files:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self._inside(name), folder / name)
        return list(self._side_files)

    def model_dir(self) -> Path | None:
        """The folder itself."""
        return self._folder

    def gguf_file(self) -> str | None:
        """None: the weights are safetensors."""
        return None

    def _find_side_files(self, names: Sequence[str]) -> list[str]:
        """The side files among ``names`` and in the folder of templates; a folder so named is none."""
        templates = self._folder / TEMPLATES_FOLDER
        inner = sorted(os.listdir(templates)) if templates.is_dir() else []
        found = [*names, *(f"{TEMPLATES_FOLDER}/{name}" for name in inner)]
        return [name for name in found if is_side_file(name) and not (self._folder / name).is_dir()]

    def _fingerprint(self, files: Mapping[str, FileHeader]) -> str:
        """Over config, headers, stamps, samples of every tensor and the side files, which it checks."""
        every = sample_step(len(self.headers))
        samples = (
            sample
            for shard, file in files.items()
            for sample in file_samples(
                self._folder / shard,
                [(file.offsets[name], header.nbytes) for name, header in file.headers.items()],
                every,
            )
        )
        side = (part for name in self._side_files for part in (name.encode(), self._small_file(name)))
        return fingerprint(self.config, self.headers, self._stamps, chain(samples, side))

    def _small_file(self, name: str) -> bytes:
        return small_file(self._folder, name, self.label)

    def _inside(self, name: str) -> Path:
        return file_inside(self._folder, name, self.label)


def small_file(folder: Path, name: str, label: str) -> bytes:
    """The contents of a file of the resolved ``folder`` that is not weights, up to a cap.

    Raises:
        CheckpointError: missing, outside the folder, unreadable or too large; ``label`` names the folder.
    """
    path = file_inside(folder, name, label)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"larger than {MAX_JSON_BYTES:,} bytes", where=str(path))
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def file_inside(folder: Path, name: str, label: str) -> Path:
    """The file ``name`` of the resolved ``folder``, once it is known to lie there really.

    A snapshot in the Hub's cache is all links to its repository's own blobs: they count as lying there.

    Raises:
        CheckpointError: it is missing, or another link out of the folder; ``label`` names the folder.
    """
    path = folder / name
    target = path.resolve()
    if not target.is_relative_to(folder) and not _is_blob(folder, target):
        raise CheckpointError(
            f"{name} is a link out of the folder, to {target}",
            where=label,
            fix="copy the file into the folder",
        )
    if not target.is_file():
        raise CheckpointError(f"{name} is missing", where=label, fix=AGAIN)
    return target


def _is_blob(folder: Path, target: Path) -> bool:
    """Whether ``folder`` is a snapshot in the Hub's cache, and ``target`` a blob of its own repository."""
    repository = folder.parent.parent
    cached = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return cached and target.parent == repository / "blobs"


def sample_step(tensors: int) -> int:
    """Which samples are read, every how manieth: three of each tensor until they are ``MAX_SAMPLES``."""
    return max(1, -(-3 * tensors // MAX_SAMPLES))


def file_samples(path: Path, spans: Sequence[tuple[int, int]], every: int) -> Iterator[bytes]:
    """First, middle and last bytes of each tensor: new weights of equal shapes change them.

    Args:
        path: the file.
        spans: offset and length in bytes of each tensor.
        every: read only every so manieth of these samples.

    Raises:
        CheckpointError: the file cannot be read.
    """
    places = [
        (offset + (length - size) * part // 2, size)
        for offset, length in spans
        for size in [min(length, SAMPLE_BYTES)]
        for part in range(3)
    ]
    try:
        with path.open("rb") as file:
            for offset, size in places[::every]:
                yield os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def file_stamp(path: Path) -> tuple[int, int]:
    """Size and modification time (ns): equal as long as nobody rewrote the file.

    Raises:
        CheckpointError: there is no such file.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return found.st_size, found.st_mtime_ns


def check_unchanged(path: Path, stamp: tuple[int, int]) -> None:
    """Raises CheckpointError where the file is no longer the one that ``file_stamp`` saw."""
    if file_stamp(path) != stamp:
        raise CheckpointError("the file changed while it was in use", where=str(path), fix="run again")
