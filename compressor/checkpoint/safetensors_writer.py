"""Writes safetensors shards whose headers are known beforehand: any order, one tensor in memory, one rename.

The layout is byte for byte that of ``safetensors.torch.save_file``
(huggingface/safetensors safetensors/src/tensor.rs, ``prepare``).
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from compressor.checkpoint.safetensors_file import safetensors_dtype
from compressor.errors import UserError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
FORMAT_PT = {"format": "pt"}

# Tensors lie in descending order of the library's Dtype enum, then by name, so that each is aligned.
_DTYPE_ORDER = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16"),
    *("I32", "U32", "F32", "F64", "I64", "U64"),
)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a small safetensors file at once, published by one rename.

    Raises:
        UserError: the disk is full.
    """
    headers = [
        TensorHeader(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    with ShardWriter(path, headers) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


class ShardWriter:
    """One safetensors file, filled tensor by tensor and published by one rename when it is whole.

    Used as a context manager it publishes on success and removes its temporary file on an exception.

    Args:
        path: where the file appears. Until ``close`` its bytes are in ``path.tmp-<pid>`` beside it.
        headers: every tensor that will be written; their order does not matter.
        metadata: the ``__metadata__`` strings.

    Raises:
        UserError: the disk is full.
    """

    def __init__(
        self, path: Path, headers: Sequence[TensorHeader], metadata: Mapping[str, str] = FORMAT_PT
    ) -> None:
        self.path = path
        self._headers = {header.name: header for header in headers}
        assert len(self._headers) == len(headers), "tensor names must differ"
        head, self._offsets, self.nbytes = _layout(headers, metadata)
        self._written: set[str] = set()
        self._left_bytes = self.nbytes
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        with _disk_full_told(path, self.nbytes):
            self._descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self._put(head, 0)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor at its place; it must have the dtype and shape of its header.

        Raises:
            UserError: the disk is full.
        """
        import torch

        header = self._headers[name]
        assert name not in self._written, f"{name} is written twice"
        assert safetensors_dtype(tensor.dtype) == header.dtype, f"{name}: {tensor.dtype} for {header.dtype}"
        assert tuple(tensor.shape) == header.shape, f"{name}: {tuple(tensor.shape)} for {header.shape}"
        flat = tensor.detach().cpu().contiguous().view(-1)
        if flat.numel():
            self._put(flat.view(torch.uint8).numpy().data, self._offsets[name])
        self._written.add(name)

    def close(self) -> None:
        """Checks that every tensor was written, makes the bytes durable and publishes the file.

        Raises:
            UserError: the disk is full.
        """
        missing = self._headers.keys() - self._written
        if missing:
            self.abort()
            raise AssertionError(f"{self.path.name}: never written: {sorted(missing)[:5]}")
        try:
            with _disk_full_told(self.path, self._left_bytes):
                os.fsync(self._descriptor)
        except BaseException:
            self.abort()
            raise
        os.close(self._descriptor)
        os.replace(self._temporary, self.path)
        _sync_folder(self.path.parent)

    def abort(self) -> None:
        """Removes the temporary file; nothing appears at ``path``."""
        os.close(self._descriptor)
        self._temporary.unlink(missing_ok=True)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        """Writes all of ``data`` at ``offset``."""
        view, done = memoryview(data), 0
        with _disk_full_told(self.path, self._left_bytes):
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)
        self._left_bytes -= done


def shard_names(count: int) -> list[str]:
    """The Hugging Face names of ``count`` shards."""
    assert count > 0
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], total_size: int) -> None:
    """Writes ``model.safetensors.index.json`` where there is more than one shard, else nothing.

    Args:
        folder: the checkpoint folder.
        shards: file name -> names of its tensors.
        total_size: bytes of all tensors.

    Raises:
        UserError: the disk is full.
    """
    if len(shards) < 2:
        return
    weight_map = {name: file for file, names in shards.items() for name in names}
    assert len(weight_map) == sum(map(len, shards.values())), "a tensor lies in two shards"
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    path = folder / INDEX_NAME
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with _disk_full_told(path, len(text)), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    _sync_folder(folder)


def _layout(
    headers: Sequence[TensorHeader], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The header's bytes, each tensor's first byte in the file, and the file's size."""
    ordered = sorted(headers, key=lambda header: (-_DTYPE_ORDER.index(header.dtype), header.name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins = {}
    position = 0
    for header in ordered:
        begins[header.name] = position
        offsets = [position, position + header.nbytes]
        entries[header.name] = {"dtype": header.dtype, "shape": list(header.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    absolute = {name: data_start + begin for name, begin in begins.items()}
    return len(text).to_bytes(8, "little") + text, absolute, data_start + position


def _sync_folder(folder: Path) -> None:
    """Makes a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_full_told(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turns "no space left" into a message that says how much is needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"disk full: {needed_bytes / 1e9:.2f} GB of this file are still to be written",
            where=str(path),
            fix=f"nothing is lost: free {needed_bytes / 1e9:.2f} GB or more and run the same command again",
        ) from error
