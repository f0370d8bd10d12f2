"""What a solver needs of a scheme: the values that scales allow, and other scales nearby."""

from __future__ import annotations

import pytest
import torch

from compressor.schemes.base import Scales, Scheme
from tests.schemes.cases import LABELS, SCHEMES, applicable, matrices
from tests.schemes.test_golden import same_bytes

NAMES = ["mixed bf16", "tails bf16", "fp16", "fp32", "zero", "tiny"]


def _nearest(scheme: Scheme, weight_OI: torch.Tensor, scales: Scales) -> torch.Tensor:
    lattice = scheme.lattice(scales, *weight_OI.shape)
    width = weight_OI.shape[1] // lattice.scale_OC.shape[1]
    scale_OI, zero_OI = (x.repeat_interleave(width, 1) for x in (lattice.scale_OC, lattice.zero_OC))
    return (lattice.grid.round(weight_OI.float() / scale_OI + zero_OI) - zero_OI) * scale_OI


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_nearest_value_is_what_is_stored(scheme: Scheme, name: str) -> None:
    """The lattice's nearest values are what encode and decode make of the matrix, and are kept by them."""
    weight = matrices()[name]
    if not applicable(scheme, weight):
        pytest.skip("not a shape for this scheme")
    scales = scheme.fit([weight], search="full")[0]
    nearest_OI = _nearest(scheme, weight, scales)
    stored = scheme.encode(weight, scales)
    assert torch.equal(nearest_OI, scheme.decode(stored, *weight.shape))
    again = scheme.encode(nearest_OI, scales)
    # the code of a negative zero may become that of zero
    assert torch.equal(scheme.decode(again, *weight.shape), nearest_OI)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_scales_nearby(scheme: Scheme, name: str) -> None:
    """The first are the scales themselves; all can be stored, and decode to values of their lattice."""
    weight = matrices()[name]
    if not applicable(scheme, weight):
        pytest.skip("not a shape for this scheme")
    scales = scheme.fit([weight], search="full")[0]
    near = scheme.near(scales, weight.shape[1])
    assert all(
        same_bytes(first, last) for first, last in zip(_tensors(near[0]), _tensors(scales), strict=True)
    )
    for other in near:
        assert other.scale.dtype == scales.scale.dtype
        assert other.scale.shape == scales.scale.shape
        assert (other.scale.float() > 0).all()
        decoded_OI = scheme.decode(scheme.encode(weight, other), *weight.shape)
        assert decoded_OI.isfinite().all()
        assert torch.equal(decoded_OI, _nearest(scheme, weight, other))


def _tensors(scales: Scales) -> list[torch.Tensor]:
    return [x for x in (scales.scale, scales.zero_point, scales.global_scale) if x is not None]


@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_which_schemes_have_scales_nearby(scheme: Scheme) -> None:
    """Those of 4 bits: 8 bits, or groups as large as rows, have little to gain."""
    weight = matrices()["mixed bf16"]
    near = scheme.near(scheme.fit([weight], search="full")[0], 256)
    assert (len(near) > 1) == (scheme.kind in {"nvfp4a16", "nvfp4", "mxfp4", "int4"})
    if len(near) > 1:
        assert any(not torch.equal(other.scale, near[0].scale) for other in near[1:])
