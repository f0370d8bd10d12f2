"""Stored tensors taken apart: each layout's weights, their plain shapes and what they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.opened import open_folder
from compressor.checkpoint.sources import open_source
from compressor.checkpoint.taken_apart import StoredTensor, Weight, take_apart
from tests.checkpoint.packed_folders import PRESETS
from tests.model.compressed import compress_folder
from tests.tiny import tiny_llama

_BYTES = {"I32": 4, "F16": 2, "F32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1, "BF16": 2, "I64": 8}
# compressed-tensors' presets by the names of schemes here.
LABELS = {"MXFP4A16": "MXFP4", "W4A16": "W4A16 g32", "W4A16_ASYM": "W4A16_ASYM g32"}


def stored(**tensors: tuple[str, tuple[int, ...]]) -> list[StoredTensor]:
    """Tensors of one module by local name; dots are written as two underscores."""
    found = []
    for name, (dtype, shape) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        found.append(StoredTensor(f"m.{name.replace('__', '.')}", dtype, shape, count * _BYTES[dtype]))
    return found


def only(tensors: list[StoredTensor], description: dict[str, Any] | None = None) -> Weight:
    """The single weight that all of the tensors are, in bytes too."""
    (weight,), kv = take_apart(tensors, description or {})
    assert kv == []
    assert weight.nbytes == sum(tensor.nbytes for tensor in tensors)
    return weight


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths every format can hold."""
    return tiny_llama(tmp_path_factory.mktemp("plain"), hidden=128, intermediate=256)


@pytest.mark.parametrize("preset", PRESETS)
def test_as_decoding_finds_it(plain: Path, tmp_path: Path, preset: str) -> None:
    """Of folders in compressed-tensors' dialect: names and shapes are those that decoding gives."""
    compress_folder(plain, tmp_path / "packed", preset)
    opened = open_folder(tmp_path / "packed")
    weights, _ = take_apart(opened.tensors, opened.config["quantization_config"])
    decoded = open_source(str(tmp_path / "packed"), from_="dequantize")
    assert {weight.name: weight.shape for weight in weights} == {
        header.name: header.shape for header in decoded.headers.values()
    }
    assert {weight.scheme for weight in weights if weight.quantized} == {LABELS.get(preset, preset)}
    assert sum(weight.nbytes for weight in weights) == sum(tensor.nbytes for tensor in opened.tensors)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 64), (2, 64), (3, 32)])
def test_gptq(bits: int, group: int) -> None:
    """AutoGPTQ's QuantLinear: words along the input, zero points along the output."""
    wide, out = 256, 96
    made = stored(
        qweight=("I32", (wide * bits // 32, out)),
        qzeros=("I32", (wide // group, out * bits // 32)),
        scales=("F16", (wide // group, out)),
        g_idx=("I32", (wide,)),
    )
    found = only(made)
    assert (found.name, found.shape, found.scheme) == ("m.weight", (out, wide), f"GPTQ {bits}-bit g{group}")


@pytest.mark.parametrize("group", [64, 128])
def test_awq(group: int) -> None:
    """AutoAWQ's WQLinear_GEMM: eight codes of neighbouring outputs in a word."""
    wide, out = 256, 96
    made = stored(
        qweight=("I32", (wide, out // 8)),
        qzeros=("I32", (wide // group, out // 8)),
        scales=("F16", (wide // group, out)),
    )
    found = only(made)
    assert (found.shape, found.scheme) == ((out, wide), f"AWQ 4-bit g{group}")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(kind: str) -> None:
    """Two codes a byte in one column; the statistics are named behind the weight."""
    made = stored(
        weight=("U8", (64 * 128 // 2, 1)),
        weight__absmax=("U8", (128,)),
        weight__quant_map=("F32", (16,)),
        weight__nested_absmax=("F32", (1,)),
        weight__nested_quant_map=("F32", (256,)),
        **{f"weight__quant_state__bitsandbytes__{kind}": ("U8", (100,))},
    )
    # Two underscores of the real name, which are no dots.
    name = f"m.weight.quant_state.bitsandbytes__{kind}"
    made[-1] = StoredTensor(name, "U8", (100,), 100)
    found = only(made)
    assert (found.values, found.scheme) == (64 * 128, f"{kind.upper()} (bitsandbytes)")


def test_bitsandbytes_in_words() -> None:
    """With a storage dtype of 16 bit, as sharded training wants it: four codes in each."""
    made = stored(weight=("BF16", (64 * 128 // 4, 1)), weight__absmax=("F32", (128,)))
    made.append(StoredTensor("m.weight.quant_state.bitsandbytes__nf4", "U8", (80,), 80))
    found = only(made)
    assert (found.values, found.scheme, found.quantized) == (64 * 128, "NF4 (bitsandbytes)", True)


def test_awq_for_single_tokens() -> None:
    """WQLinear_GEMV packs along the input: it is not taken for the other layout."""
    made = stored(
        qweight=("I32", (96, 32)), qzeros=("I32", (96, 1)), scales=("F16", (96, 8)), g_idx=("I32", (1,))
    )
    assert only(made).scheme == "32-bit words of codes"


def test_bitsandbytes_8bit() -> None:
    """Codes, a scale for each row, and a mark."""
    made = stored(weight=("I8", (64, 128)), SCB=("F32", (64,)), weight_format=("U8", ()))
    assert (only(made).shape, only(made).scheme) == ((64, 128), "LLM.int8 (bitsandbytes)")


@pytest.mark.parametrize(
    ("tensors", "scheme", "shape"),
    [
        # DeepSeek-V3.
        ({"weight": ("F8_E4M3", (256, 512)), "weight_scale_inv": ("F32", (2, 4))}, "FP8_BLOCK", (256, 512)),
        # ModelOpt.
        (
            {
                "weight": ("U8", (64, 32)),
                "weight_scale": ("F8_E4M3", (64, 4)),
                "weight_scale_2": ("F32", ()),
                "input_scale": ("F32", ()),
            },
            "NVFP4",
            (64, 64),
        ),
        (
            {"weight": ("F8_E4M3", (64, 64)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())},
            "FP8",
            (64, 64),
        ),
        ({"weight": ("F8_E4M3", (64, 64)), "weight_scale": ("F32", (1,))}, "FP8 per tensor", (64, 64)),
        # gpt-oss.
        (
            {
                "gate_up_proj_blocks": ("U8", (4, 96, 2, 16)),
                "gate_up_proj_scales": ("U8", (4, 96, 2)),
            },
            "MXFP4",
            (4, 96, 64),
        ),
        # Llama 4's own FP8: experts in one tensor, a scale for each column of each.
        (
            {"gate_up_proj": ("F8_E4M3", (4, 64, 96)), "gate_up_proj_scale": ("F32", (4, 1, 96))},
            "FP8_DYNAMIC",
            (4, 64, 96),
        ),
    ],
)
def test_other_layouts(
    tensors: dict[str, tuple[str, tuple[int, ...]]], scheme: str, shape: tuple[int, ...]
) -> None:
    """Of other programs, by their names."""
    found = only(stored(**tensors))
    assert (found.scheme, found.shape) == (scheme, shape)


def test_plain_tensors_and_scales_of_a_cache() -> None:
    """Vectors, tables and biases are weights of their own; scales of keys and values are none."""
    made = stored(
        weight=("BF16", (4, 2)), bias=("BF16", (4,)), position_ids=("I64", (1, 9)), ids=("I32", (3,))
    )
    made += stored(k_scale=("F32", ()), v_scale=("F32", ()))
    weights, kv = take_apart(made, {})
    assert [(one.name, one.scheme, one.quantized) for one in weights] == [
        ("m.weight", "BF16", False),
        ("m.bias", "BF16", False),
        ("m.position_ids", "I64", False),
        ("m.ids", "I32", False),
    ]
    assert [scale.name for scale in kv] == ["m.k_scale", "m.v_scale"]


def test_groups_of_several_sizes() -> None:
    """Each matrix has the group of the config that its shapes fit."""
    groups = {
        "a": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}},
        "b": {"weights": {"num_bits": 8, "type": "int", "group_size": 64}},
    }
    four = stored(weight_packed=("I32", (16, 16)), weight_scale=("BF16", (16, 4)), weight_shape=("I64", (2,)))
    eight = stored(
        weight_packed=("I32", (16, 32)), weight_scale=("BF16", (16, 2)), weight_shape=("I64", (2,))
    )
    assert [only(made, {"config_groups": groups}).scheme for made in (four, eight)] == [
        "W4A16 g32",
        "W8A16 g64",
    ]
    assert only(four, {}).scheme == "packed integers"


@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (3,), (1, 1, 1, 1)])
@pytest.mark.parametrize(
    "names",
    [
        ("qweight", "scales"),
        ("qweight", "qzeros"),
        ("weight_packed", "weight_scale"),
        ("x_blocks", "x_scales"),
        ("weight", "weight.absmax"),
        ("weight", "weight_scale"),
        ("weight", "SCB"),
    ],
)
def test_nonsense_is_told_as_it_lies(names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """No shape or dtype stops it, and every byte is counted once."""
    groups = {"config_groups": {"a": {"weights": {"num_bits": True, "group_size": -1}}, "b": 7}}
    for dtype in ("I32", "U8", "F8_E4M3", "BF16"):
        count = int(torch.tensor(shape).prod()) if shape else 1
        made = [StoredTensor(f"m.{name}", dtype, shape, count * _BYTES[dtype]) for name in names]
        weights, kv = take_apart(made, groups)
        assert sum(weight.nbytes for weight in weights) == sum(tensor.nbytes for tensor in made)
        assert kv == []
