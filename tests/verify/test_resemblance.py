"""Values against the source: what a broken scale or code does to a matrix, and what rounding may do."""

from __future__ import annotations

import pytest
import torch

from compressor.schemes import parse_scheme
from compressor.verify.resemblance import resemblance
from compressor.verify.values import CALIBRATED, CALIBRATED_ERROR, GAIN, LIMIT_4BIT, LIMIT_8BIT

SHAPE = (64, 256)
GROUPS = {
    "nvfp4a16": (1, 16),
    "mxfp4": (1, 32),
    "int4": (1, 128),
    "int8": (1, 256),
    "fp8_dynamic": (1, 256),
    "fp8_block": (128, 128),
    "fp8_static": (1, 256),
}


def matrix(kind: str, seed: int = 0) -> torch.Tensor:
    """Ordinary weights, heavy tails, or rows with one outlier among small values."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(SHAPE, generator=generator)
    if kind == "tails":
        return weight_OI**3
    if kind == "outliers":
        weight_OI *= 0.06
        weight_OI[:, 7] = 1.0
    return weight_OI


@pytest.mark.parametrize("kind", ["normal", "tails", "outliers"])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("search", ["full", "minmax"])
def test_honest_rounding_breaks_no_group(name: str, kind: str, search: str) -> None:
    """Every scheme on every distribution: no group is called broken, whatever its own error."""
    scheme = parse_scheme(name)
    weight_OI = matrix(kind)
    scales = scheme.fit([weight_OI], search=search)[0]  # type: ignore[arg-type]
    decoded_OI = scheme.decode(scheme.encode(weight_OI, scales), *SHAPE)
    found = resemblance(decoded_OI, weight_OI, GROUPS[name])
    assert found.groups == 0
    assert found.astray == 0
    if kind == "normal":
        assert found.relative < (LIMIT_4BIT if name in ("nvfp4a16", "mxfp4", "int4") else LIMIT_8BIT)


@pytest.mark.parametrize("kind", ["normal", "tails", "outliers"])
@pytest.mark.parametrize("name", GROUPS)
def test_gain_tells_scales_that_are_all_off(name: str, kind: str) -> None:
    """Within the limit for honest rounding, beyond it once all scales are a tenth too large."""
    scheme = parse_scheme(name)
    weight_OI = matrix(kind)
    decoded_OI = scheme.decode(scheme.encode(weight_OI, scheme.fit([weight_OI], search="full")[0]), *SHAPE)
    honest = resemblance(decoded_OI, weight_OI, GROUPS[name])
    assert abs(honest.gain) <= GAIN + honest.relative
    if kind == "normal":
        off = resemblance(decoded_OI * 1.1, weight_OI, GROUPS[name])
        assert abs(off.gain) > GAIN + off.relative


@pytest.mark.parametrize("factor", [0.5, 2.0, -1.0])
@pytest.mark.parametrize("name", GROUPS)
def test_one_wrong_scale_is_found(name: str, factor: float) -> None:
    """A single group off by two, though the matrix as a whole hardly changes."""
    rows, columns = GROUPS[name]
    weight_OI = matrix("normal")
    decoded_OI = weight_OI.clone()
    decoded_OI[:rows, :columns] *= factor
    found = resemblance(decoded_OI, weight_OI, GROUPS[name])
    assert found.groups == 1


def test_nan_is_found() -> None:
    """NaN compares false with every limit."""
    weight_OI = matrix("normal")
    decoded_OI = weight_OI.clone()
    decoded_OI[3, 5] = torch.nan
    found = resemblance(decoded_OI, weight_OI, (1, 16))
    assert found.groups == 1
    assert not found.relative <= LIMIT_4BIT


def test_cut_groups_are_filled() -> None:
    """A block format may end within a block: the rest counts as zeros."""
    weight_OI = matrix("normal")[:50, :200]
    decoded_OI = weight_OI.clone()
    decoded_OI[48:, 192:] *= 2
    found = resemblance(decoded_OI, weight_OI, (16, 16))
    assert found.groups == 1
    error = (decoded_OI - weight_OI).square().sum() / weight_OI.square().sum()
    # float32 sums in another order than float64's
    assert found.relative == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize("name", ["nvfp4a16", "mxfp4", "int4"])
def test_two_swapped_codes_are_found(name: str) -> None:
    """The halves of one byte, exchanged: nothing but two weights changes."""
    scheme = parse_scheme(name)
    weight_OI = matrix("normal")
    scales = scheme.fit([weight_OI], search="full")[0]
    decoded_OI = scheme.decode(scheme.encode(weight_OI, scales), *SHAPE)
    decoded_OI[5, [8, 9]] = decoded_OI[5, [9, 8]]
    assert resemblance(decoded_OI, weight_OI, GROUPS[name]).groups == 1


@pytest.mark.parametrize(("name", "columns"), [("nvfp4a16", 16), ("int4", 128)])
def test_scales_of_the_neighbours_are_found(name: str, columns: int) -> None:
    """All scales moved by one group: too many strays for rounding, too much error for calibration."""
    scheme = parse_scheme(name)
    weight_OI = matrix("normal")
    scales = scheme.fit([weight_OI], search="full")[0]
    decoded_OI = scheme.decode(scheme.encode(weight_OI, scales), *SHAPE)
    used_OC = scales.scale.float()
    wrong_OI = decoded_OI * (used_OC.roll(1, 1) / used_OC).repeat_interleave(columns, 1)
    found = resemblance(wrong_OI, weight_OI, (1, columns))
    assert found.astray > CALIBRATED
    assert found.relative > min(LIMIT_4BIT, CALIBRATED_ERROR * found.relative / found.excess)
