"""What any checkpoint holds, quantized ones included, from headers alone."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.layout import MAX_JSON_BYTES, parse_index, weight_files
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
        raise CheckpointError("no such folder", where=str(folder))
    config = _config(folder)
    first = weight_files([path.name for path in folder.iterdir()], str(folder))
    shards = [first]
    if first == INDEX_NAME:
        shards = list(dict.fromkeys(parse_index((folder / INDEX_NAME).read_bytes(), str(folder)).values()))
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
        quantization=config.get("quantization_config"),
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError("config.json is missing or not of sane size", where=str(folder))
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError("config.json is not valid JSON", where=str(path)) from error
    if not isinstance(config, dict):
        raise CheckpointError("config.json is not a JSON object", where=str(path))
    return config


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
