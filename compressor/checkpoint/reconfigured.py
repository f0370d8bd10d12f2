"""A source as another config.json describes it: the same tensors, other positions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Kind, Source
from compressor.checkpoint.wrapping import Wrapping
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

TOKENIZER_CONFIG = "tokenizer_config.json"


class ReconfiguredSource(Wrapping):
    """A source with another config, for all who read it afterwards.

    Attributes as ``Source`` describes them.

    Args:
        inner: the source.
        config: what takes the place of its config.json.
        length: tokens that the result reads; a tokenizer that says less is raised to it.
    """

    def __init__(self, inner: Source, config: dict[str, Any], length: int) -> None:
        self.inner = inner
        self.config: dict[str, Any] = config
        self.length = length
        self.label: str = inner.label
        # Loaded whole, its tensors are asked for: the config in the folder is not its own.
        self.kind: Kind = "dequantized" if inner.kind == "safetensors" else inner.kind
        self.revision: str | None = inner.revision
        self.license: str | None = inner.license
        self.headers: Mapping[str, TensorHeader] = inner.headers
        self.note: str = inner.note
        told = f"{inner.fingerprint} {length} {json.dumps(config, sort_keys=True)}"
        self.fingerprint: str = hashlib.sha256(told.encode()).hexdigest()

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """See ``Source.read``."""
        return self.inner.read(name, index)

    def stored_names(self, name: str) -> Collection[str]:
        """The tensor itself."""
        return (name,)

    def gguf_file(self) -> str | None:
        """See ``Source.gguf_file``: the tokenizer lies there."""
        return self.inner.gguf_file()

    def write_side_files(self, folder: Path) -> list[str]:
        """See ``Source.write_side_files``; a lower ``model_max_length`` of the tokenizer is raised.

        Raises:
            CheckpointError: the tokenizer's config is no JSON object.
        """
        names = self.inner.write_side_files(folder)
        path = folder / TOKENIZER_CONFIG
        if TOKENIZER_CONFIG not in names:
            return names
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"is not readable: {error}", where=str(path)) from error
        if not isinstance(described, dict):
            raise CheckpointError("is no JSON object", where=str(path))
        limit = described.get("model_max_length")
        if isinstance(limit, int | float) and limit < self.length:
            path.write_text(json.dumps(described | {"model_max_length": self.length}, indent=2) + "\n")
        return names
