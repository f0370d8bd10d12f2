"""The full search of each scheme: never worse than min-max, follows importance, independent of chunks."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics import groups
from compressor.schemes.base import Scales, Scheme
from compressor.schemes.nvfp4 import Nvfp4A16
from compressor.schemes.nvfp4_fit import tensor_scale
from tests.schemes.cases import LABELS, SCHEMES, applicable, matrices

ALL = pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)


def _error(
    scheme: Scheme, weight: torch.Tensor, scales: Scales, importance: torch.Tensor | None = None
) -> float:
    shape = (weight.shape[0], weight.shape[1])
    unit = float(weight.float().abs().max()) or 1.0
    miss = (scheme.decode(scheme.encode(weight, scales), *shape).double() - weight.double()) / unit
    return float((miss**2 * (1.0 if importance is None else importance.double())).sum())


@ALL
@pytest.mark.parametrize("name", ["mixed bf16", "tails bf16", "fp16", "fp32", "huge", "zero"])
def test_never_worse_than_min_max(scheme: Scheme, name: str) -> None:
    """The squared error of the search is at most that of min-max, to fp32 rounding."""
    weight = matrices()[name]
    if not applicable(scheme, weight):
        pytest.skip("not a shape for this scheme")
    full, minmax = (scheme.fit([weight], search=search)[0] for search in ("full", "minmax"))
    assert _error(scheme, weight, full) <= _error(scheme, weight, minmax) * (1 + 1e-6)


# Relative squared error of the search over that of min-max on normal weights, and a margin.
GAINS = {"NVFP4A16": 0.74, "MXFP4A16": 0.998, "FP8_DYNAMIC": 0.86, "FP8_BLOCK": 0.985, "W4A16 g128": 0.84}
GAINS |= {"W4A16 g32": 0.84, "W4A16_ASYM g128": 0.9, "W8A16": 0.97, "W8A16 g128": 0.95, "W8A8": 0.97}


@pytest.mark.parametrize("label", GAINS)
def test_gain_on_normal_weights(label: str) -> None:
    """How much the search wins is known; a broken one wins less."""
    scheme = SCHEMES[LABELS.index(label)]
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    full, minmax = (scheme.fit([weight], search=search)[0] for search in ("full", "minmax"))
    assert _error(scheme, weight, full) < GAINS[label] * _error(scheme, weight, minmax)


@ALL
def test_importance_is_what_is_minimised(scheme: Scheme) -> None:
    """With importance, the weighted error is less than what the search without it leaves."""
    weight = matrices()["tails bf16"]
    importance = torch.logspace(-3, 2, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(3))]
    plain = scheme.fit([weight], search="full")[0]
    weighted = scheme.fit([weight], search="full", importance_I=importance)[0]
    bound = _error(scheme, weight, plain, importance)
    # too few choices to gain for certain, or none
    coarse = scheme.label.startswith(("MXFP4", "FP8_BLOCK")) or scheme.label == "FP8"
    assert _error(scheme, weight, weighted, importance) <= bound * (1 + 1e-6 if coarse else 0.999)


@ALL
def test_chunks_change_nothing(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a matrix is taken whole or in chunks of rows, the same bytes come out, and decode the same."""
    weight = matrices()["mixed bf16"]
    whole = scheme.fit([weight], search="full")[0]
    tensors = scheme.encode(weight, whole)
    decoded = scheme.decode(tensors, 136, 256)
    monkeypatch.setattr(groups, "CHUNK_VALUES", 256 * 9)
    parts = scheme.fit([weight], search="full")[0]
    assert torch.equal(parts.scale, whole.scale)
    for local, tensor in scheme.encode(weight, parts).items():
        assert torch.equal(tensor.view(torch.uint8), tensors[local].view(torch.uint8)), local
    assert torch.equal(scheme.decode(tensors, 136, 256), decoded)


def test_fused_matrices_share_a_tensor_scale() -> None:
    """One tensor-level scale for the group, set by its largest value, in both searches."""
    weights = [matrices()["fp32"], matrices()["fp32"] * 8]
    for search in ("full", "minmax"):
        together = Nvfp4A16().fit(weights, search=search)
        alone = Nvfp4A16().fit(weights[1:], search=search)[0]
        for scales in together:
            assert scales.global_scale is not None
            assert alone.global_scale is not None
            assert torch.equal(scales.global_scale, alone.global_scale)
        assert torch.equal(together[1].scale, alone.scale)


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-3, 1.0, 1.5, 3.4e38])
def test_tensor_scale(largest: float) -> None:
    """A power of two with room above the largest block; its reciprocal is a normal number."""
    scale = tensor_scale(largest)
    assert torch.frexp(torch.tensor(scale)).mantissa == 0.5
    assert largest * scale <= 6 * 256
    assert largest * scale > 3 * 256 or scale == 2.0**126
    assert tensor_scale(0.0) == 1.0


def test_decoded_values_are_exact_in_bf16() -> None:
    """With a power of two as tensor-level scale, bf16 holds every decoded weight."""
    weight = matrices()["fp32"]
    scheme = Nvfp4A16()
    decoded = scheme.decode(scheme.encode(weight, scheme.fit([weight], search="full")[0]), 128, 128)
    assert torch.equal(decoded.bfloat16().float(), decoded)
