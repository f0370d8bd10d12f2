"""The tensors of any checkpoint folder, quantized or not, read one by one. Nothing in it is trusted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.folder import file_inside, small_file
from compressor.checkpoint.layout import merge_headers, parse_index, weight_files
from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import INDEX_NAME
from compressor.errors import CheckpointError

if TYPE_CHECKING:
    import torch


class StoredTensors:
    """A folder of safetensors files; opening it reads the index and the headers.

    Attributes:
        headers: name -> header of every tensor, in file order.

    Raises:
        CheckpointError: no such folder, no weights, a broken file, or one that links out of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._label = str(folder)
        if not self._folder.is_dir():
            raise CheckpointError("no such folder", where=self._label)
        lead = weight_files(sorted(os.listdir(self._folder)), self._label)
        weight_map = parse_index(self.small_file(lead), self._label) if lead == INDEX_NAME else {}
        shards = sorted(set(weight_map.values())) or [lead]
        files = {shard: read_header(file_inside(self._folder, shard, self._label)) for shard in shards}
        self.headers, self._homes = merge_headers(files, weight_map, self._label, quantized=True)
        self._offsets = {name: offset for file in files.values() for name, offset in file.offsets.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it lies on disk, in fresh memory.

        Raises:
            CheckpointError: there is no such tensor, or the file has become unreadable.
        """
        if name not in self.headers:
            raise CheckpointError(f"tensor {name} is missing", where=self._label)
        return read_tensor(self._folder / self._homes[name], self.headers[name], self._offsets[name])

    def has_file(self, name: str) -> bool:
        """Whether the folder has a file of this name."""
        return (self._folder / name).is_file()

    def small_file(self, name: str) -> bytes:
        """The contents of a file that is not weights.

        Raises:
            CheckpointError: missing, outside the folder, unreadable or too large.
        """
        return small_file(self._folder, name, self._label)
