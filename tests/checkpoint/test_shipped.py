"""Shipped headers plan and never read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint.shipped import ShippedHeaders
from compressor.errors import CheckpointError
from compressor.spec import TensorHeader

ROWS = [["model.embed_tokens.weight", "BF16", [32, 8]], ["model.norm.weight", "F32", [8]]]


def write(folder: Path, tensors: object, config: str = '{"model_type": "llama"}') -> Path:
    """A folder of shipped headers."""
    (folder / "config.json").write_text(config)
    (folder / "tensors.json").write_text(json.dumps({"source": "org/name", "tensors": tensors}))
    return folder


def test_plans_and_does_not_read(tmp_path: Path) -> None:
    """Headers in their order, the note with the reason, and no weights."""
    source = ShippedHeaders(write(tmp_path, ROWS), "no connection")
    assert list(source.headers.values()) == [
        TensorHeader("model.embed_tokens.weight", "BF16", (32, 8)),
        TensorHeader("model.norm.weight", "F32", (8,)),
    ]
    assert source.config == {"model_type": "llama"}
    assert (source.label, source.kind) == ("org/name", "headers")
    assert source.note == "planned from shipped headers (no connection)"
    assert source.model_dir() is source.gguf_file() is source.revision is None
    with pytest.raises(CheckpointError, match="planned from shipped headers: no weights here"):
        source.read("model.norm.weight")
    with pytest.raises(CheckpointError, match="no weights here"):
        source.write_side_files(tmp_path)


def test_a_range_stands_for_each_of_its_tensors(tmp_path: Path) -> None:
    """``{0-N}`` is N + 1 names, in order, of one dtype and shape."""
    source = ShippedHeaders(write(tmp_path, [["experts.{0-11}.w", "BF16", [4, 2]], *ROWS]))
    assert list(source.headers) == [*(f"experts.{n}.w" for n in range(12)), *(row[0] for row in ROWS)]
    assert source.headers["experts.11.w"] == TensorHeader("experts.11.w", "BF16", (4, 2))


@pytest.mark.parametrize(
    "tensors, message",
    [
        (None, "must be"),
        ([["a", "BF16"]], "not .name, dtype, shape."),
        ([["a", "BF17", [1]]], "unknown dtype"),
        ([["a", "BF16", [-1]]], "impossible shape"),
        ([["a", "BF16", [2**40, 2**40]]], "impossible shape"),
        ([["a", "BF16", [1]]] * 2, "listed twice"),
        ([["a{0-1}", "BF16", [1]], ["a1", "BF16", [1]]], "tensor a1 is listed twice"),
        ([[f"{c}{{0-99999}}", "BF16", [1]] for c in "abcdefghijk"], "more than 1,000,000 tensors"),
    ],
)
def test_refuses(tmp_path: Path, tensors: Any, message: str) -> None:
    """Malformed listings are refused."""
    with pytest.raises(CheckpointError, match=message):
        ShippedHeaders(write(tmp_path, tensors))


def test_missing(tmp_path: Path) -> None:
    """A folder without the files is the user's fault."""
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read"):
        ShippedHeaders(tmp_path)
