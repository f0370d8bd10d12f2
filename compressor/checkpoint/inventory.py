"""What any checkpoint holds, quantized ones included, from headers alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.layout import MAX_JSON_BYTES, load_config, parse_index, weight_files
from compressor.checkpoint.safetensors_file import read_header
from compressor.checkpoint.safetensors_writer import INDEX_NAME
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader


@dataclass(frozen=True)
class Kind:
    """Tensors of one leaf name and dtype, added up."""

    leaf: str
    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Inventory:
    """A checkpoint folder's contents.

    Attributes:
        folder: where it lies.
        architectures: from config.json.
        files: weight file -> bytes.
        tensors: how many tensors.
        bytes: tensor bytes.
        kinds: tensors by leaf name and dtype, largest first.
        quantization: ``quantization_config`` of config.json, or None.
    """

    folder: str
    architectures: tuple[str, ...]
    files: dict[str, int]
    tensors: int
    bytes: int
    kinds: tuple[Kind, ...]
    quantization: dict[str, Any] | None


def take_inventory(folder: Path) -> Inventory:
    """Reads config.json and every shard's header.

    Raises:
        CheckpointError: no checkpoint, or a file in it is broken.
    """
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=str(folder), fix="name a checkpoint's folder")
    config = read_config(folder)
    first = weight_files([path.name for path in folder.iterdir()], str(folder))
    shards = [first]
    if first == INDEX_NAME:
        shards = list(dict.fromkeys(parse_index(_small_file(folder / INDEX_NAME), str(folder)).values()))
    headers: list[TensorHeader] = []
    sizes = {}
    for shard in shards:
        read = read_header(folder / shard)
        headers += read.headers.values()
        sizes[shard] = read.file_bytes
    return Inventory(
        folder=str(folder),
        architectures=tuple(str(name) for name in config.get("architectures") or ()),
        files=sizes,
        tensors=len(headers),
        bytes=sum(header.nbytes for header in headers),
        kinds=_kinds(headers),
        quantization=_quantization(config, str(folder / "config.json")),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of the folder's config.json.

    Raises:
        CheckpointError: missing, too large, or no JSON object.
    """
    return load_config(_small_file(folder / "config.json"), str(folder / "config.json"))


def _small_file(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing", where=str(path.parent))
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"larger than {MAX_JSON_BYTES:,} bytes", where=str(path))
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _quantization(config: dict[str, Any], where: str) -> dict[str, Any] | None:
    found = config.get("quantization_config") or None
    if found is not None and not _has_groups(found):
        raise CheckpointError("config.json: quantization_config is not laid out as one", where=where)
    return found


def _has_groups(quantization: object) -> bool:
    """Whether it is an object whose ``config_groups``, where it has any, are objects with objects."""
    groups = (quantization.get("config_groups") or {}) if isinstance(quantization, dict) else None
    return isinstance(groups, dict) and all(
        isinstance(group, dict) and isinstance(group.get("weights") or {}, dict) for group in groups.values()
    )


def _kinds(headers: list[TensorHeader]) -> tuple[Kind, ...]:
    grouped: dict[tuple[str, str], list[TensorHeader]] = defaultdict(list)
    for header in headers:
        leaf = ".".join(part for part in header.name.split(".")[-2:] if not part.isdecimal())
        grouped[leaf, header.dtype].append(header)
    kinds = [
        Kind(leaf, dtype, len(members), sum(header.nbytes for header in members))
        for (leaf, dtype), members in grouped.items()
    ]
    return tuple(sorted(kinds, key=lambda kind: (-kind.bytes, kind.leaf)))
