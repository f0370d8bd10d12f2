"""What a source of weights is: a folder, a Hub repository, a GGUF file, or shipped headers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch


Kind = Literal["safetensors", "gguf", "headers", "dequantized"]


class Source(Protocol):
    """A checkpoint that is read tensor by tensor; opening one reads its config and headers only.

    Attributes:
        label: how the plan and the card name it (path, Hub id@revision, file).
        kind: ``safetensors`` (folder or Hub), ``gguf``, ``dequantized`` (folder or Hub, the weights stored
            quantized and read as BF16), or ``headers`` (plan only: ``read`` raises).
        note: a sentence for plan and card when the source needs one ("dequantized from GGUF Q4_1"), or "".
        revision: the Hub commit, or None.
        license: the licence identifier that the source states ("apache-2.0"), or None.
        config: contents of ``config.json`` (for GGUF: rebuilt from the metadata).
        headers: every stored tensor by name, in file order, as ``read`` returns it: GGUF tensors count as
            BF16, since they are dequantized.
        fingerprint: hex sha256, the content key of the source: over config, headers and file sizes, and over
            the Hub commit or, for local files, their times of modification, samples of every tensor and the
            side files.
    """

    label: str
    kind: Kind
    note: str
    revision: str | None
    license: str | None
    config: dict[str, Any]
    headers: Mapping[str, TensorHeader]
    fingerprint: str

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """The tensor ``name`` on the CPU, in memory of its own (no mmap: resident memory stays bounded).

        With ``index``, only that entry along the first dimension is read and returned, without the dimension:
        one expert of a fused ``[experts, in, out]`` tensor.

        Raises:
            CheckpointError: the file is truncated, changed since it was opened, or holds no weights.
        """
        ...

    def write_side_files(self, folder: Path) -> list[str]:
        """Writes everything that is not weights or config.json (tokenizer, chat template, generation
        config, processor, licence, notice) into ``folder``; returns the names written, with ``/`` where one
        lies in a subfolder.
        """
        ...

    def model_dir(self) -> Path | None:
        """A local folder that ``transformers`` can load the source from, or None where there is none.

        Of a ``dequantized`` source it can load the tokenizer there, and not the weights. For GGUF the folder
        holds the file and ``gguf_file()`` names it.
        """
        ...

    def gguf_file(self) -> str | None:
        """The GGUF file's name inside ``model_dir()``, or None."""
        ...


@runtime_checkable
class FetchedSource(Protocol):
    """A source whose files are downloaded when something in them is read.

    Attributes:
        homes: tensor -> the file that it lies in.
        file_bytes: size of each of these files.
        held_bytes: what of them is on the disk now.
    """

    @property
    def homes(self) -> Mapping[str, str]:
        """See above."""
        ...

    @property
    def file_bytes(self) -> Mapping[str, int]:
        """See above."""
        ...

    @property
    def held_bytes(self) -> int:
        """See above."""
        ...

    def keep_only(self, names: Set[str]) -> None:
        """Removes from the disk every file that holds none of these tensors; read again, it is fetched again.

        May run beside reads of these tensors.
        """
        ...


@runtime_checkable
class WrappingSource(Protocol):
    """A source that reads another one's tensors, under its own names.

    Attributes:
        inner: the other one.
    """

    @property
    def inner(self) -> Source:
        """See above."""
        ...

    def stored_names(self, name: str) -> Collection[str]:
        """The tensors of ``inner`` that are read for the tensor ``name``."""
        ...


@dataclass(frozen=True)
class FetchedFiles:
    """What a source downloads.

    Attributes:
        homes: tensor -> the files that are read for it.
        file_bytes: size of each file.
        held_bytes: what of them is on the disk now.
    """

    homes: Mapping[str, Collection[str]]
    file_bytes: Mapping[str, int]
    held_bytes: int


def fetched_files(source: Source) -> FetchedFiles | None:
    """What the source downloads, or the one that it wraps; None where all is local."""
    if isinstance(source, WrappingSource):
        inner = fetched_files(source.inner)
        if inner is None:
            return None
        homes = {
            name: {file for stored in source.stored_names(name) for file in inner.homes[stored]}
            for name in source.headers
        }
        return FetchedFiles(homes, inner.file_bytes, inner.held_bytes)
    if isinstance(source, FetchedSource):
        homes = {name: {file} for name, file in source.homes.items()}
        return FetchedFiles(homes, source.file_bytes, source.held_bytes)
    return None


def let_go(source: Source, still_read: Set[str]) -> None:
    """Frees the disk of what was fetched for other tensors than these; of local sources nothing."""
    if isinstance(source, WrappingSource):
        let_go(source.inner, {stored for name in still_read for stored in source.stored_names(name)})
    elif isinstance(source, FetchedSource):
        source.keep_only(still_read)
