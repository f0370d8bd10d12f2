"""Tensors of a finished folder are replaced, files that are links are let alone, and nothing else changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.replaced import replace_tensors
from compressor.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, the second a hard link of one outside."""
    kept = tmp_path / "kept"
    kept.mkdir()
    made = tmp_path / "made"
    made.mkdir()
    save_file({"a": torch.ones(2, 3), "b": torch.arange(4)}, made / "model-1.safetensors")
    save_file({"c": torch.ones(5).bfloat16(), "d": torch.zeros(1)}, kept / "model-2.safetensors")
    os.link(kept / "model-2.safetensors", made / "model-2.safetensors")
    return made


def test_one_tensor_changes_and_the_rest_stays(folder: Path) -> None:
    """The file without it is the same file; the linked file outside keeps its bytes."""
    before = (folder / "model-1.safetensors").stat()
    replace_tensors(folder, {"c": torch.full((5,), 7.0).bfloat16()})
    found = load_file(folder / "model-2.safetensors")
    assert torch.equal(found["c"], torch.full((5,), 7.0).bfloat16())
    assert torch.equal(found["d"], torch.zeros(1))
    assert (folder / "model-1.safetensors").stat() == before
    outside = load_file(folder.parent / "kept" / "model-2.safetensors")
    assert torch.equal(outside["c"], torch.ones(5).bfloat16())
    assert sorted(path.name for path in folder.iterdir()) == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("e", torch.ones(1), "e lies in 0 of its files"),
        ("a", torch.ones(3, 2), r"a is F32 \[2, 3\], not F32 \[3, 2\]"),
        ("a", torch.ones(2, 3).half(), r"not F16 \[2, 3\]"),
        ("a", torch.full((2, 3), float("nan")), "not finite"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    name: str, tensor: torch.Tensor, message: str, folder: Path
) -> None:
    """Refused before any file is written."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=message):
        replace_tensors(folder, {"d": torch.ones(1), name: tensor})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
