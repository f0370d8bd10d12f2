"""Quantized sources that are refused, with what is wrong and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.dequantized import DequantizedSource
from compressor.checkpoint.shipped import ShippedHeaders
from compressor.checkpoint.sources import open_source
from compressor.errors import CheckpointError
from tests.checkpoint.packed_folders import Q_PROJ, Tensors, edit, fp8, write
from tests.model.compressed import compress_folder
from tests.tiny import tiny_llama

CT: dict[str, Any] = {"quant_method": "compressed-tensors", "config_groups": {}}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
F8 = fp8(128, 128)


@pytest.mark.parametrize(
    "quantization, tensors, message",
    [
        (None, {"a.weight": torch.ones(2)}, "config.json has no quantization_config"),
        ({"quant_method": "gptq"}, {"a.qweight": torch.ones(2)}, "quantized with 'gptq'; fp8, mxfp4"),
        ({"bits": 4}, {"a.qweight": torch.ones(2)}, "quantized with ''"),
        (BLOCKS, {"a.weight": F8["weight"]}, "tensor a.weight_scale_inv is missing"),
        (BLOCKS, {"a.weight_scale_inv": torch.ones(1, 1)}, "a.weight_scale_inv scales no tensor"),
        (
            BLOCKS,
            {"a.weight": F8["weight"], "a.weight_scale_inv": torch.ones(2, 1)},
            r"a.weight_scale_inv is F32 \[2, 1\], where F32 or BF16 or F16 \[1, 1\] belongs",
        ),
        (
            BLOCKS,
            {"a.weight": F8["weight"], "a.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)},
            r"a.weight_scale_inv is I32 \[1, 1\]",
        ),
        (
            BLOCKS,
            {"a.weight": F8["weight"], "a.weight_scale_inv": torch.ones(1, 1), "b": torch.ones(2).byte()},
            "tensor b is U8, and FP8 in blocks of 128 x 128 does not say how it is quantized",
        ),
        (BLOCKS | {"fmt": "e5m2"}, F8, "FP8 format 'e5m2'"),
        (BLOCKS | {"weight_block_size": [0, 128]}, F8, r"weight_block_size is \[0, 128\]"),
        (BLOCKS | {"weight_block_size": 128}, F8, "weight_block_size is 128"),
        ({"quant_method": "mxfp4"}, {"a": torch.ones(2)}, "no tensor is called \\*_blocks"),
        (
            {"quant_method": "mxfp4"},
            {"a_blocks": torch.ones(1, 2, 3, 8).byte(), "a_scales": torch.ones(1, 2, 3).byte()},
            r"shape \[1, 2, 3, 8\], not \[experts, out, in / 32, 16\]",
        ),
        ({"quant_method": "mxfp4"}, {"a_blocks": torch.ones(1, 2, 3, 16).byte()}, "a_scales is missing"),
        (CT, {"a.weight": torch.ones(2)}, "no tensor is called \\*.weight_scale"),
        (CT, {"a.weight": torch.ones(2), "a.weight_scale": torch.ones(2)}, "no group of quantization_config"),
        (CT | {"transform_config": {"x": 1}}, {"a.weight": torch.ones(2)}, "rotated"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, {"a.weight": torch.ones(2)}, "sparse"),
        (CT, {"experts.w_weight_scale": torch.ones(2)}, "experts quantized in one tensor"),
    ],
)
def test_refused_when_it_is_opened(
    quantization: dict[str, Any] | None, tensors: Tensors, message: str, tmp_path: Path
) -> None:
    """One message that names the tensor or the format."""
    folder = write(tmp_path / "m", quantization, {name: tensor.clone() for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        open_source(str(folder), from_="dequantize")


@pytest.mark.parametrize("preset", ["W4A16", "FP8_BLOCK", "NVFP4"])
@pytest.mark.parametrize(
    "path, value",
    [
        (("config_groups", "group_0", "weights", "num_bits"), 0),
        (("config_groups", "group_0", "weights", "num_bits"), -4),
        (("config_groups", "group_0", "weights", "num_bits"), 10**9),
        (("config_groups", "group_0", "weights", "group_size"), "128"),
        (("config_groups", "group_0", "weights", "group_size"), [128]),
        (("config_groups", "group_0", "weights", "scale_dtype"), 5),
        (("config_groups", "group_0", "targets"), ["re:("]),
        (("config_groups", "group_0"), None),
        (("config_groups", "group_0"), []),
        (("config_groups",), {"zz": ["Linear"]}),
        (("config_groups",), 5),
        (("ignore",), ["re:("]),
        (("ignore",), [5]),
        (("kv_cache_scheme",), 5),
    ],
)
def test_spoilt_descriptions(preset: str, path: tuple[str, ...], value: object, tmp_path: Path) -> None:
    """Whatever the library makes of them, they are faults of the checkpoint."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    compress_folder(plain, tmp_path / "packed", preset)
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    inner = config["quantization_config"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        open_source(str(tmp_path / "packed"), from_="dequantize")


def _drop(leaf: str) -> Callable[[Tensors], Any]:
    return lambda stored: stored.pop(f"{Q_PROJ}.{leaf}")


def _put(leaf: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda stored: stored.update({f"{Q_PROJ}.{leaf}": tensor})


@pytest.mark.parametrize(
    "preset, spoil, message",
    [
        ("W4A16", _drop("weight_scale"), "weight_scale is missing"),
        ("W4A16", _drop("weight_packed"), "q_proj.weight_packed is missing"),
        ("W4A16", _drop("weight_shape"), "q_proj.weight_shape is missing"),
        ("W4A16", _put("weight_shape", torch.tensor([128])), r"weight_shape is I64 \[1\]"),
        ("W4A16", _put("weight_scale", torch.ones(128, 3)), r"weight_scale is F32 \[128, 3\]"),
        ("W4A16", _put("weight_g_idx", torch.ones(128)), "weight_g_idx belongs to a quantized module"),
        ("W4A16", _put("weight", torch.ones(128, 128)), "q_proj.weight belongs to a quantized module"),
        ("W4A16", _put("weight_packed", torch.ones(128).int()), r"weight_packed is I32 \[128\]"),
        (
            "W4A16_ASYM",
            _put("weight_zero_point", torch.ones(1, 4).int()),
            r"weight_zero_point is I32 \[1, 4\]",
        ),
        ("NVFP4", _put("weight_global_scale", torch.ones(2)), r"weight_global_scale is F32 \[2\]"),
        ("NVFP4", _put("input_global_scale", torch.ones(2)), r"input_global_scale is F32 \[2\]"),
        ("NVFP4", _drop("input_global_scale"), "input_global_scale is missing"),
        (
            "NVFP4A16",
            _put("weight_scale", torch.ones(128, 8)),
            r"weight_scale is F32 \[128, 8\], where F8_E4M3",
        ),
        ("FP8_BLOCK", _put("weight_scale", torch.ones(1, 2)), r"weight_scale is F32 \[1, 2\]"),
        ("W8A8", _put("weight", torch.ones(128, 128)), r"q_proj.weight is F32 \[128, 128\], where I8"),
    ],
)
def test_spoilt_modules(preset: str, spoil: Callable[[Tensors], Any], message: str, tmp_path: Path) -> None:
    """Headers that do not fit the scheme are faults before anything is read."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    compress_folder(plain, tmp_path / "packed", preset)
    edit(tmp_path / "packed", spoil)
    with pytest.raises(CheckpointError, match=message):
        open_source(str(tmp_path / "packed"), from_="dequantize")


@pytest.mark.parametrize(
    "preset, leaf, value, message",
    [
        ("FP8_DYNAMIC", "weight_scale", float("nan"), "q_proj.weight_scale has values that are not finite"),
        ("NVFP4", "input_global_scale", float("inf"), "input_global_scale has values that are not finite"),
        ("NVFP4A16", "weight_scale", float("nan"), "weight_scale has values that are not finite"),
        ("MXFP4A16", "weight_scale", 255, "weight_scale has values that are not finite"),
        ("FP8_DYNAMIC", "weight", float("nan"), "non-finite values .* once it is dequantized"),
        ("W4A16", "weight_shape", 120, r"weight_shape is \[128, 120\], its codes are padded to \[128, 128\]"),
    ],
)
def test_spoilt_values(preset: str, leaf: str, value: float, message: str, tmp_path: Path) -> None:
    """What headers cannot tell is refused when the tensor is read."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    compress_folder(plain, tmp_path / "packed", preset)

    def spoil(stored: Tensors) -> None:
        tensor = stored[f"{Q_PROJ}.{leaf}"]
        flat = tensor.float() if tensor.is_floating_point() else tensor.clone()
        flat.view(-1)[-1] = value
        stored[f"{Q_PROJ}.{leaf}"] = flat.to(tensor.dtype)

    edit(tmp_path / "packed", spoil)
    with pytest.raises(CheckpointError, match=message):
        open_source(str(tmp_path / "packed"), from_="dequantize").read(f"{Q_PROJ}.weight")


def test_hostile_mxfp4_scale(tmp_path: Path) -> None:
    """Code 255 of E8M0 is NaN."""
    tensors = {"a_blocks": torch.ones(1, 2, 1, 16).byte(), "a_scales": torch.full((1, 2, 1), 255).byte()}
    folder = write(tmp_path / "m", {"quant_method": "mxfp4"}, tensors)
    with pytest.raises(CheckpointError, match="a_scales has values that are not finite"):
        open_source(str(folder), from_="dequantize").read("a", 0)


def test_planned_from_shipped_headers(tmp_path: Path) -> None:
    """Headers of a quantized checkpoint are enough for a plan; nothing can be read."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": BLOCKS}))
    rows = [["a.weight", "F8_E4M3", [256, 128]], ["a.weight_scale_inv", "F32", [2, 1]]]
    (tmp_path / "tensors.json").write_text(json.dumps({"source": "org/name", "tensors": rows}))
    source = DequantizedSource(ShippedHeaders(tmp_path, quantized=True))
    assert source.kind == "headers"
    assert [(header.dtype, header.shape) for header in source.headers.values()] == [("BF16", (256, 128))]
    assert source.note.startswith("planned from shipped headers; dequantized from FP8")
    with pytest.raises(CheckpointError, match="no weights here"):
        source.read("a.weight")


def test_without_being_asked_it_is_refused(tmp_path: Path) -> None:
    """The message names both ways to ask."""
    folder = write(tmp_path / "m", BLOCKS, {f"a.{name}": tensor for name, tensor in F8.items()})
    with pytest.raises(
        CheckpointError, match=r"(?s)already quantized.*model.from: dequantize.*--from dequantize"
    ):
        open_source(str(folder))
