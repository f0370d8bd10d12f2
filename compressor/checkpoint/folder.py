"""A source in a local Hugging Face folder: config.json, one or many safetensors shards, tokenizer files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Kind
from compressor.checkpoint.layout import (
    MAX_JSON_BYTES,
    card_license,
    fingerprint,
    is_side_file,
    merge_headers,
    parse_config,
    parse_index,
    weight_files,
)
from compressor.checkpoint.safetensors_file import AGAIN, read_header, read_tensor
from compressor.checkpoint.safetensors_writer import INDEX_NAME
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

SAMPLES = 16
SAMPLE_BYTES = 4096


class FolderSource:
    """A local folder; opening reads config.json, the index and the headers, and no weights.

    Attributes as ``Source`` describes them.

    Raises:
        CheckpointError: whatever makes the folder incomplete, unsafe or unsupported; see ``layout``.
    """

    kind: Kind = "safetensors"
    note = ""
    revision: str | None = None

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self._folder = folder.resolve()
        self.label = label or str(folder)
        if not self._folder.is_dir():
            raise CheckpointError("no such folder", where=str(folder))
        names = sorted(os.listdir(self._folder))
        if "config.json" not in names:
            weight_files(names, str(folder))
            raise CheckpointError("config.json is missing", where=str(folder))
        self.config: dict[str, Any] = parse_config(self._small_file("config.json"), self.label)
        self.license = card_license(self._small_file("README.md")) if "README.md" in names else None
        lead = weight_files(names, self.label)
        weight_map = parse_index(self._small_file(lead), self.label) if lead == INDEX_NAME else {}
        shards = sorted(set(weight_map.values())) or [lead]
        files = {shard: read_header(self._inside(shard)) for shard in shards}
        headers, self._homes = merge_headers(files, weight_map, self.label)
        self.headers: Mapping[str, TensorHeader] = headers
        self._offsets = {name: offset for file in files.values() for name, offset in file.offsets.items()}
        self._stamps = {shard: _stamp(self._folder / shard) for shard in shards}
        sizes = {shard: file.file_bytes for shard, file in files.items()}
        samples = (sample for shard in shards for sample in file_samples(self._folder / shard))
        self.fingerprint = fingerprint(self.config, headers, sizes, samples)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """See ``Source.read``."""
        path = self._folder / self._homes[name]
        if _stamp(path) != self._stamps[self._homes[name]]:
            raise CheckpointError("the file changed while it was in use", where=str(path), fix="run again")
        return read_tensor(path, self.headers[name], self._offsets[name], index)

    def write_side_files(self, folder: Path) -> list[str]:
        """Copies tokenizer, template, processor, generation and licence files; see ``Source``."""
        names = [name for name in sorted(os.listdir(self._folder)) if is_side_file(name)]
        for name in names:
            shutil.copyfile(self._inside(name), folder / name)
        return names

    def model_dir(self) -> Path | None:
        """The folder itself."""
        return self._folder

    def gguf_file(self) -> str | None:
        """None: the weights are safetensors."""
        return None

    def _small_file(self, name: str) -> bytes:
        """The contents of a JSON file of the folder, up to a cap."""
        path = self._inside(name)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"larger than {MAX_JSON_BYTES:,} bytes", where=str(path))
        return path.read_bytes()

    def _inside(self, name: str) -> Path:
        """The file ``name`` of the folder, once it is known to lie there really."""
        path = self._folder / name
        target = path.resolve()
        if not target.is_relative_to(self._folder):
            raise CheckpointError(
                f"{name} is a link out of the folder, to {target}",
                where=self.label,
                fix="copy the file into the folder, or name a cached Hub model by its Hub id",
            )
        if not target.is_file():
            raise CheckpointError(f"{name} is missing", where=self.label, fix=AGAIN)
        return target


def file_samples(path: Path) -> Iterator[bytes]:
    """A few short reads spread evenly over a file: new weights of equal shapes change them.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for number in range(SAMPLES):
                file.seek(max(size - SAMPLE_BYTES, 0) * number // (SAMPLES - 1))
                yield file.read(SAMPLE_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _stamp(path: Path) -> tuple[int, int]:
    """Size and modification time: equal as long as nobody rewrote the file."""
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return found.st_size, found.st_mtime_ns
