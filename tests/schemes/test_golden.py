"""Bytes, names, shapes and decoded values against ``compressed_tensors``' own compressors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open

from compressor.numerics.input_ranges import RangeSums
from compressor.schemes.base import Scales, Scheme, Search
from compressor.schemes.nvfp4 import Nvfp4A16
from tests.schemes.cases import LABELS, SCHEMES, applicable, matrices

TORCH_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
SAFETENSORS_DTYPES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}
GOLDEN = Path(__file__).with_name("golden.safetensors")


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal dtype, shape and bits."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))


def _library(described: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(CompressionFormat(described.format).value)


def _state(weight: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
    """What the library's compressor takes: the same values in fp32, in which it then computes."""
    state = {"weight": weight.float(), "weight_scale": scales.scale.float()}
    if scales.zero_point is not None:
        state["weight_zero_point"] = scales.zero_point
    if scales.global_scale is not None:
        state["weight_global_scale"] = scales.global_scale
    return state


@pytest.mark.parametrize("search", ["minmax", "full"])
@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_same_scales_same_bytes_and_back(scheme: Scheme, name: str, search: Search) -> None:
    """Same scales in, same bytes out; the library decodes them to our values; scales are finite and > 0."""
    weight = matrices()[name]
    if not applicable(scheme, weight):
        pytest.skip("not a shape for this scheme")
    scales = scheme.fit([weight], search=search)[0]
    assert scales.scale.float().isfinite().all()
    assert (scales.scale.float() > 0).all()
    described = scheme.ct_scheme(["Linear"])
    ours = scheme.encode(weight, scales)
    theirs = _library(described).compress(_state(weight, scales), described)
    assert ours.keys() == theirs.keys()
    for local, tensor in ours.items():
        # Their scale stays as it was given: fp32 here, the stored dtype in a model.
        expected = theirs[local].to(tensor.dtype) if local == "weight_scale" else theirs[local]
        assert same_bytes(tensor, expected), local
    shape = (weight.shape[0], weight.shape[1])
    decoded = scheme.decode(ours, *shape)
    read_back = _library(described).decompress(dict(ours), described)["weight"]
    assert torch.equal(decoded.to(read_back.dtype), read_back)


@pytest.mark.parametrize("name", ["mixed bf16", "fp16", "fp32"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_outputs_are_what_is_written(scheme: Scheme, name: str) -> None:
    """The plan's headers have exactly the names, dtypes and shapes of the tensors."""
    weight = matrices()[name]
    dtype = SAFETENSORS_DTYPES[weight.dtype]
    planned = scheme.outputs("m", weight.shape[0], weight.shape[1], dtype=dtype)
    heard = RangeSums(weight.shape[1], "cpu")
    heard.add(weight)
    written = scheme.encode(weight, scheme.fit([weight], search="minmax")[0])
    written |= scheme.input_tensors(heard.result())
    assert {header.name: (TORCH_DTYPES[header.dtype], header.shape) for header in planned} == {
        f"m.{local}": (tensor.dtype, tuple(tensor.shape)) for local, tensor in written.items()
    }


@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_real_matrix(scheme: Scheme) -> None:
    """A real matrix gives the tensors that the pinned library made of it (see scripts/make_golden.py)."""
    with safe_open(GOLDEN, "pt") as golden:
        weight = golden.get_tensor("weight")
        prefix = scheme.label + "/"
        names = [key for key in golden.keys() if key.startswith(prefix)]  # noqa: SIM118 (no mapping)
        expected = {key.removeprefix(prefix): golden.get_tensor(key) for key in names}
    ours = scheme.encode(weight, scheme.fit([weight], search="minmax")[0])
    assert ours.keys() == expected.keys()
    for local, tensor in ours.items():
        assert same_bytes(tensor, expected[local]), local


def test_real_matrix_search() -> None:
    """On a real matrix, every block has the least error that a search over all codes in fp64 found."""
    with safe_open(GOLDEN, "pt") as golden:
        weight, least = golden.get_tensor("weight"), golden.get_tensor("search/least_error")
        shared = golden.get_tensor("search/weight_global_scale")
    scheme = Nvfp4A16()
    found = scheme.fit([weight], search="full")[0]
    assert found.global_scale is not None
    assert torch.equal(found.global_scale, shared)
    decoded = scheme.decode(scheme.encode(weight, found), weight.shape[0], weight.shape[1])
    errors = ((decoded.double() - weight.double()) * shared.double()).square().view(-1, 16).sum(1)
    torch.testing.assert_close(errors, least, rtol=1e-5, atol=0)
