"""Small quantized folders, and what is read of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.sources import open_source
from tests.model.compressed import FORMATS

Q_PROJ = "model.layers.0.self_attn.q_proj"
# W8A16 is a preset of groups, but made by hand with a scale for each row.
PRESETS = [preset for preset in FORMATS if preset != "W8A16"]
Tensors = dict[str, torch.Tensor]


def write(folder: Path, quantization: dict[str, Any] | None, tensors: Tensors) -> Path:
    """A folder that only a source opens."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama"} | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Changes the tensors of a folder in place."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def read(folder: Path, name: str, index: int | None = None) -> torch.Tensor:
    """The tensor of the opened folder, of the dtype and shape that its header promises."""
    source = open_source(str(folder), from_="dequantize")
    found = source.read(name, index)
    header = source.headers[name]
    assert header.dtype == "BF16"
    assert found.dtype == torch.bfloat16
    assert tuple(found.shape) == (header.shape if index is None else header.shape[1:])
    return found


def fp8(*shape: int, block: int = 128) -> Tensors:
    """Codes and scales of a matrix, or of several, in FP8 blocks."""
    generator = torch.Generator().manual_seed(0)
    scale_shape = (*shape[:-2], -(-shape[-2] // block), -(-shape[-1] // block))
    return {
        "weight": (torch.randn(shape, generator=generator) * 60).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(scale_shape, generator=generator) * 0.002 + 0.001,
    }
