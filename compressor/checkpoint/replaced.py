"""Tensors of a finished checkpoint folder, replaced by others of the same names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.safetensors_file import read_header, read_tensor, safetensors_dtype
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def replace_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes the files that hold ``tensors`` anew; the index and all other files stay.

    A file is published by one rename, so that one that is a link leaves what it links to alone; killed in
    between and run again with the same tensors, the folder ends the same.

    Raises:
        CheckpointError: a tensor is in no file, in several, or of another shape or dtype; or is not finite.
        UserError: the disk is full.
    """
    files = {path: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    for name, tensor in tensors.items():
        stored = [file.headers[name] for file in files.values() if name in file.headers]
        if len(stored) != 1:
            raise CheckpointError(f"{name} lies in {len(stored)} of its files, not in one", where=str(folder))
        made = (safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        if made != (stored[0].dtype, stored[0].shape):
            raise CheckpointError(
                f"{name} is {stored[0].dtype} {list(stored[0].shape)}, not {made[0]} {list(made[1])}",
                where=str(folder),
            )
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{name} would hold values that are not finite", where=str(folder))
    for path, file in files.items():
        if file.headers.keys().isdisjoint(tensors):
            continue
        with ShardWriter(path, list(file.headers.values())) as writer:
            for name, header in file.headers.items():
                found = tensors.get(name)
                writer.write(name, read_tensor(path, header, file.offsets[name]) if found is None else found)
