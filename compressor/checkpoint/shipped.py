"""Headers without weights, shipped in ``recipes/configs/NAME/``: enough to plan where no hub answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Kind
from compressor.checkpoint.layout import fingerprint, parse_config
from compressor.checkpoint.safetensors_file import checked_header, load_json
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "config.json"
TENSORS_NAME = "tensors.json"
# ``experts.{0-255}.``: a row for every number, so that a file with hundreds of experts a layer stays small.
_RANGE = re.compile(r"\{0-(\d{1,5})\}")
# The largest published checkpoints have a tenth of it.
_MAX_TENSORS = 1_000_000


class ShippedHeaders:
    """``config.json`` and ``tensors.json`` (``{"source": ..., "tensors": [[name, dtype, shape], ...]}``).

    A name with ``{0-N}`` in it stands for N + 1 tensors, with each number in its place.

    Args:
        folder: where the two files are.
        reason: why the weights themselves are not at hand, for the note; may be empty.
        quantized: whether the config may say that the weights are quantized.

    Raises:
        CheckpointError: a file is missing or not what it should be.
    """

    kind: Kind = "headers"
    revision: str | None = None

    def __init__(self, folder: Path, reason: str = "", *, quantized: bool = False) -> None:
        self.config: dict[str, Any] = parse_config(
            _contents(folder / CONFIG_NAME), str(folder / CONFIG_NAME), quantized=quantized
        )
        where = str(folder / TENSORS_NAME)
        listing = load_json(_contents(folder / TENSORS_NAME), where, TENSORS_NAME)
        rows = listing.get("tensors") if isinstance(listing, dict) else None
        if not isinstance(rows, list) or not isinstance(listing.get("source"), str):
            raise CheckpointError(
                'must be {"source": text, "tensors": [[name, dtype, shape], ...]}', where=where
            )
        headers: dict[str, TensorHeader] = {}
        for row in rows:
            if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str):
                raise CheckpointError(f"not [name, dtype, shape]: {str(row)[:80]}", where=where)
            for name in _names(row[0]):
                header = checked_header(name, row[1], row[2], where)
                if header.name in headers:
                    raise CheckpointError(f"tensor {header.name} is listed twice", where=where)
                headers[header.name] = header
                if len(headers) > _MAX_TENSORS:
                    raise CheckpointError(f"lists more than {_MAX_TENSORS:,} tensors", where=where)
        self.label: str = listing["source"]
        self.license: str | None = None
        self.note = "planned from shipped headers" + (f" ({reason})" if reason else "")
        self.headers: Mapping[str, TensorHeader] = headers
        self.fingerprint = fingerprint(self.config, headers, {}, [b"shipped"])

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Always raises ``CheckpointError``: there is nothing to read."""
        raise _no_weights(name)

    def write_side_files(self, folder: Path) -> list[str]:
        """Always raises ``CheckpointError``: there is nothing to copy."""
        raise _no_weights(self.label)

    def model_dir(self) -> Path | None:
        """None: nothing can be loaded."""
        return None

    def gguf_file(self) -> str | None:
        """None: there is no file."""
        return None


def _names(written: str) -> Iterator[str]:
    """The names that a row stands for."""
    found = _RANGE.search(written)
    if found is None:
        yield written
        return
    for number in range(int(found[1]) + 1):
        yield f"{written[: found.start()]}{number}{written[found.end() :]}"


def _contents(path: Path) -> bytes:
    """The bytes of a shipped file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _no_weights(where: str) -> CheckpointError:
    return CheckpointError(
        "planned from shipped headers: no weights here",
        where=where,
        fix="run where the Hub can be reached, or set model.source to a local folder",
    )
