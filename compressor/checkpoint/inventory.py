"""What any checkpoint holds, quantized ones included, from headers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.layout import stated_quantization
from compressor.checkpoint.opened import Opened, open_folder
from compressor.checkpoint.taken_apart import StoredTensor
from compressor.errors import CheckpointError


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
    """What a local folder holds.

    Raises:
        CheckpointError: no checkpoint, or a file in it is broken.
    """
    return inventory_of(open_folder(folder))


def inventory_of(opened: Opened) -> Inventory:
    """What an opened checkpoint holds.

    Raises:
        CheckpointError: its quantization is not laid out as one.
    """
    return Inventory(
        folder=opened.label,
        architectures=tuple(str(name) for name in opened.config.get("architectures") or ()),
        files=dict(opened.files),
        tensors=len(opened.tensors),
        bytes=sum(tensor.nbytes for tensor in opened.tensors),
        kinds=_kinds(opened.tensors),
        quantization=_quantization(opened.config, f"{opened.label}/config.json"),
    )


def _quantization(config: dict[str, Any], where: str) -> dict[str, Any] | None:
    found = stated_quantization(config)
    if found is None:
        return None
    if not isinstance(found, dict) or not _has_groups(found):
        raise CheckpointError("config.json: quantization_config is not laid out as one", where=where)
    return found


def _has_groups(quantization: object) -> bool:
    """Whether it is an object whose ``config_groups``, where it has any, are objects with objects."""
    groups = (quantization.get("config_groups") or {}) if isinstance(quantization, dict) else None
    return isinstance(groups, dict) and all(
        isinstance(group, dict) and isinstance(group.get("weights") or {}, dict) for group in groups.values()
    )


def _kinds(headers: Sequence[StoredTensor]) -> tuple[Kind, ...]:
    grouped: dict[tuple[str, str], list[StoredTensor]] = defaultdict(list)
    for header in headers:
        leaf = ".".join(part for part in header.name.split(".")[-2:] if not part.isdecimal())
        grouped[leaf, header.dtype].append(header)
    kinds = [
        Kind(leaf, dtype, len(members), sum(header.nbytes for header in members))
        for (leaf, dtype), members in grouped.items()
    ]
    return tuple(sorted(kinds, key=lambda kind: (-kind.bytes, kind.leaf)))
