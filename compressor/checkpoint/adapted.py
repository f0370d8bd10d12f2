"""A source with trained tensors in the place of its own, for all who read it afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Kind, Source
from compressor.checkpoint.safetensors_file import read_header, read_tensor
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.checkpoint.wrapping import Wrapping
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

ADAPTED_NAME = "adapted.tensors"  # safetensors; some engines take every file of that suffix for weights


def write_adapted(
    folder: Path,
    headers: Mapping[str, TensorHeader],
    names: Collection[str],
    made: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Writes ``adapted.tensors``: the tensors ``names`` as ``made`` gives them, one at a time.

    ``headers``: the source's, which they keep the dtypes and shapes of.

    Raises:
        UserError: the disk is full.
    """
    with ShardWriter(folder / ADAPTED_NAME, [headers[name] for name in names]) as writer:
        for name, tensor in made:
            writer.write(name, tensor)


class AdaptedSource(Wrapping):
    """A source as its adapters have changed it.

    Attributes as ``Source`` describes them, and ``changed``: names of the tensors that are others.

    Args:
        inner: the source, in 16 bit or read as such.
        folder: holds ``adapted.tensors``.
        key: what tells this training from all others; it is part of the fingerprint.

    Raises:
        CheckpointError: there is no such file, or it is none of this model's.
    """

    def __init__(self, inner: Source, folder: Path, key: str) -> None:
        self.inner = inner
        self._path = folder / ADAPTED_NAME
        self._file = read_header(self._path)
        for name, header in self._file.headers.items():
            own = inner.headers.get(name)
            if own is None or (own.dtype, own.shape) != (header.dtype, header.shape):
                raise self._broken(f"tensor {name[:80]!r} is none of this model's")
        if not self._file.headers:
            raise self._broken("it is empty")
        self.changed: Collection[str] = self._file.headers.keys()
        self.label: str = inner.label
        # Loaded whole, its tensors are asked for: those in the folder are not its own.
        self.kind: Kind = "headers" if inner.kind == "headers" else "dequantized"
        self.revision: str | None = inner.revision
        self.license: str | None = inner.license
        self.headers: Mapping[str, TensorHeader] = inner.headers
        self.note: str = inner.note
        self.config: dict[str, Any] = inner.config
        self.fingerprint: str = hashlib.sha256(f"{inner.fingerprint} {key}".encode()).hexdigest()

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """See ``Source.read``.

        Raises:
            CheckpointError: also where a trained value is not finite.
        """
        header = self._file.headers.get(name)
        if header is None:
            return self.inner.read(name, index)
        tensor = read_tensor(self._path, header, self._file.offsets[name], index)
        if not bool(tensor.isfinite().all()):
            raise self._broken(f"tensor {name[:80]!r} holds values that are not finite")
        return tensor

    def stored_names(self, name: str) -> Collection[str]:
        """The tensor itself; of those that training changed, nothing is read of the inner source."""
        return () if name in self.changed else (name,)

    def gguf_file(self) -> str | None:
        """See ``Source.gguf_file``: the tokenizer lies there."""
        return self.inner.gguf_file()

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(what, where=str(self._path), fix="run the recipe again")
