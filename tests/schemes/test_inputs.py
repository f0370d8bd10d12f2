"""Activations: rounded bit for bit as ``compressed_tensors`` does, under scales that calibration chooses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize

from compressor.errors import CheckpointError
from compressor.numerics import groups
from compressor.numerics.input_ranges import RangeSums
from compressor.schemes import parse_scheme
from compressor.schemes.base import Scheme
from tests.schemes.cases import LABELS, SCHEMES, hard_inputs, some_range

ROUNDING = [scheme for scheme in SCHEMES if scheme.rounds_inputs]
STATIC = [scheme for scheme in SCHEMES if scheme.static_inputs]


def _by_library(scheme: Scheme, x_NI: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the library's quantized forward does it with a batch of one sequence."""
    module: Any = SimpleNamespace(quantization_status=QuantizationStatus.COMPRESSED, **tensors)
    activations = scheme.ct_scheme([]).input_activations
    assert activations is not None
    rounded: torch.Tensor = forward_quantize(module, x_NI[None], "input", activations)[0]
    return rounded


@pytest.mark.parametrize("scheme", ROUNDING, ids=lambda scheme: scheme.label)
def test_rounded_as_the_library_does(scheme: Scheme) -> None:
    """Bit for bit on fp32; on 16-bit inputs the same arithmetic in fp32, rounded once at the end."""
    x_NI = hard_inputs()
    tensors = scheme.input_tensors(some_range(x_NI))
    rounded = scheme.round_inputs(x_NI, tensors)
    theirs = _by_library(scheme, x_NI, tensors)
    assert torch.equal(rounded.view(torch.int32), theirs.view(torch.int32))
    assert not torch.equal(rounded, x_NI)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = x_NI.to(dtype)
        expected = _by_library(scheme, narrow.float(), tensors).to(dtype)
        assert torch.equal(scheme.round_inputs(narrow, tensors), expected)


@pytest.mark.parametrize("scheme", ROUNDING, ids=lambda scheme: scheme.label)
def test_chunks_and_no_rows(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is rounded by itself."""
    x_NI = hard_inputs()
    tensors = scheme.input_tensors(some_range(x_NI))
    whole = scheme.round_inputs(x_NI, tensors)
    monkeypatch.setattr(groups, "CHUNK_VALUES", 256 * 9)
    assert torch.equal(scheme.round_inputs(x_NI, tensors), whole)
    assert scheme.round_inputs(x_NI[:0], tensors).shape == (0, 256)


def test_which_schemes_do_what() -> None:
    """Only those that round activations say so, and only those with a stored scale ask for calibration."""
    assert [scheme.label for scheme in STATIC] == ["NVFP4", "FP8"]
    assert {scheme.label for scheme in ROUNDING} == {
        *("NVFP4", "MXFP4", "FP8_DYNAMIC", "FP8_BLOCK", "FP8", "W8A8"),
    }
    x_NI = hard_inputs()
    for scheme in SCHEMES:
        if not scheme.rounds_inputs:
            assert scheme.round_inputs(x_NI, {}) is x_NI
        if not scheme.static_inputs:
            assert scheme.input_tensors(some_range(x_NI)) == {}


@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_stored_scales_are_those_listed(scheme: Scheme) -> None:
    """Of ``outputs``, ``input_tensors`` makes those of the inputs, ``encode`` all others."""
    listed = {header.name: (header.dtype, header.shape) for header in scheme.outputs("m", 128, 256)}
    made = scheme.input_tensors(some_range(hard_inputs()))
    assert {name for name in listed if name.startswith("m.input")} == {f"m.{local}" for local in made}
    for local, tensor in made.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (1,))
        assert listed[f"m.{local}"] == ("F32", (1,))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scheme", STATIC, ids=lambda scheme: scheme.label)
def test_error_is_near_the_least(scheme: Scheme, scale: float) -> None:
    """No scale some octaves off rounds the calibration inputs much better than the one chosen."""
    generator = torch.Generator().manual_seed(1)
    channels = torch.exp(torch.randn(256, generator=generator))
    x_NI = torch.randn(2000, 256, generator=generator) * channels * scale
    tensors = scheme.input_tensors(some_range(x_NI))
    ((name, chosen),) = tensors.items()

    def error(factor: float) -> float:
        return float((scheme.round_inputs(x_NI, {name: chosen * factor}) - x_NI).square().sum())

    least = min(error(2.0**octave) for octave in range(-20, 21))
    # TOLERANCE, and what the histogram does not tell
    assert error(1.0) <= 1.01 * least


@pytest.mark.parametrize("scheme", STATIC, ids=lambda scheme: scheme.label)
def test_one_outlier_does_not_set_the_range(scheme: Scheme) -> None:
    """Min-max of one row a million times as long as the others would leave those hardly a code."""
    x_NI = torch.randn(4096, 256, generator=torch.Generator().manual_seed(2))
    x_NI[17] *= 1e7
    tensors = scheme.input_tensors(some_range(x_NI))
    others = torch.arange(len(x_NI)) != 17
    miss = (scheme.round_inputs(x_NI, tensors) - x_NI)[others]
    kept = float(miss.square().sum() / x_NI[others].square().sum())
    dynamic = parse_scheme("fp8_dynamic" if scheme.label == "FP8" else "nvfp4")
    alone = {} if scheme.label == "FP8" else scheme.input_tensors(some_range(x_NI[others]))
    floor = dynamic.round_inputs(x_NI[others], alone) - x_NI[others]
    assert kept < 1.1 * float(floor.square().sum() / x_NI[others].square().sum())


@pytest.mark.parametrize("scheme", STATIC, ids=lambda scheme: scheme.label)
def test_no_scale_that_says_nothing(scheme: Scheme) -> None:
    """Nothing heard, not finite, beyond all models: refused. All zero: a range that ordinary inputs fit."""
    with pytest.raises(CheckpointError, match="no token of the calibration text reached it"):
        scheme.input_tensors(RangeSums(256, "cpu").result())
    for value in (float("nan"), float("inf"), -float("inf")):
        x_NI = hard_inputs()
        x_NI[20, 3] = value
        with pytest.raises(CheckpointError, match="not finite"):
            scheme.input_tensors(some_range(x_NI))
        # not forgotten beside others
        for merged in (
            some_range(x_NI).merge(some_range(hard_inputs())),
            some_range(hard_inputs()).merge(some_range(x_NI)),
        ):
            with pytest.raises(CheckpointError, match="not finite"):
                scheme.input_tensors(merged)
    with pytest.raises(CheckpointError, match="reach 4e"):
        scheme.input_tensors(some_range(torch.full((4, 256), 4e12)))
    for x_NI in (torch.zeros(5, 256), torch.full((5, 256), 1e-30)):
        tensors = scheme.input_tensors(some_range(x_NI))
        ones = torch.linspace(-1, 1, 256)[None]
        assert float((scheme.round_inputs(ones, tensors) - ones).abs().max()) < 0.2
