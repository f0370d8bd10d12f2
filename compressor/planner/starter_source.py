"""The model of a starter recipe: opened, and how the recipe must name it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from compressor import data
from compressor.checkpoint.base import Source
from compressor.checkpoint.dequantized import DequantizedSource
from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.hub import HubSource, HubUnavailable
from compressor.checkpoint.layout import stated_quantization
from compressor.checkpoint.shipped import TENSORS_NAME, ShippedHeaders
from compressor.checkpoint.sources import local_path, open_source
from compressor.errors import CheckpointError, UserError
from compressor.planner.starter_parts import Section


def open_named(model: str, revision: str | None) -> tuple[Source, Section]:
    """The source, and the section that names it.

    Raises:
        CheckpointError: it cannot be opened, or is quantized in a way that is not read.
        UserError: a revision of what is not on the Hub.
    """
    told: dict[str, Any] = {"source": model}
    reasons: list[str] = []
    headers = _shipped(model)
    if headers is not None:
        source: Source = ShippedHeaders(data.find(headers), quantized=True)
        told = {"source": _hub_id(source.label), "headers": headers}
        reasons.append("Planned from shipped headers; a run fetches the model itself.")
    else:
        # Opened as it lies first: whether it is quantized decides how it is read.
        source = _as_it_lies(model, revision)
        if isinstance(source, HubSource):
            told["revision"] = source.revision
            reasons.append("The commit that was looked at; a branch or tag may change under a recipe.")
    stated = stated_quantization(source.config)
    if stated is not None:
        told["from"] = "dequantize"
        method = stated.get("quant_method") if isinstance(stated, dict) else stated
        reasons.append(f"Stored quantized ({str(method)[:40]}): read as bfloat16, tensor by tensor.")
        source = DequantizedSource(source)
    return source, Section("model", told, tuple(reasons))


def _as_it_lies(model: str, revision: str | None) -> Source:
    path = local_path(model, None)
    if path is not None:
        if path.suffix == ".gguf":
            return open_source(model, revision=revision, planning=True)
        if revision is not None:
            raise UserError("--revision goes with a Hub id, not with what lies here", where=model)
        return FolderSource(path, label=model, quantized=True)
    return HubSource(model, revision, quantized=True)


def _shipped(model: str) -> str | None:
    """The folder of shipped headers that ``model`` names, or that are of a Hub id which cannot be reached."""
    root = data.shipped_root()
    try:
        path = local_path(model, None)
    except CheckpointError:
        return None
    if path is not None:
        if not path.is_dir() or not (path / TENSORS_NAME).is_file():
            return None
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else model
    folders = [file.parent for file in sorted((root / "recipes" / "configs").glob(f"*/{TENSORS_NAME}"))]
    known = [folder for folder in folders if _source_of(folder / TENSORS_NAME) == model]
    if not known:
        return None
    try:
        HubSource(model, None, quantized=True)
    except HubUnavailable:
        return known[0].relative_to(root).as_posix()
    return None


def _source_of(file: Path) -> str:
    listing = json.loads(file.read_bytes())
    return _hub_id(str(listing.get("source")))


def _hub_id(label: str) -> str:
    """Of shipped headers, which say more behind it: the commit, or how they were made."""
    return re.split(r"[@,\s]", label, maxsplit=1)[0]
