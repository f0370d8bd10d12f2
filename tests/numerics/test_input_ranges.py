"""What is heard of inputs, and the expected errors, against slow second implementations."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.numerics.input_ranges import (
    BLOCK_BITS,
    HEAD_ROOM,
    TOLERANCE,
    VALUE_BITS,
    InputRange,
    RangeSums,
    _peaks,
    best_e4m3_scale,
    best_nvfp4_scale,
    bin_centres,
    bin_of,
    bin_widths,
    bins,
    e4m3_errors,
    nvfp4_errors,
)
from compressor.schemes import parse_scheme


def _heard(*batches: torch.Tensor) -> InputRange:
    sums = RangeSums(batches[0].shape[1], "cpu")
    for x_NI in batches:
        sums.add(x_NI)
    return sums.result()


def _normal(rows: int, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _same(first: InputRange, second: InputRange) -> None:
    assert (first.largest, first.rows) == (second.largest, second.rows)
    for name in ("values_V", "blocks_K", "shape_U"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [VALUE_BITS, BLOCK_BITS])
def test_bins_hold_their_numbers(bits: int) -> None:
    """Each magnitude lies in its bin, from the least number to the largest."""
    centres, widths = bin_centres(bits), bin_widths(bits)
    x = torch.logspace(-37, 38, 4000)
    found = bin_of(x, bits)
    assert ((x.double() - centres[found]).abs() <= widths[found] / 2).all()
    assert bin_of(torch.tensor([1.0, 1.249, 1.25, 1.75, 2.0]), 2).diff().tolist() == [0, 1, 2, 1]
    assert int(bin_of(torch.tensor([float("inf")]), bits)) < bins(bits)
    assert (centres.isfinite() & widths.isfinite()).all()


def test_sums_are_what_was_heard() -> None:
    """Value by value: weights, maxima of blocks, and each value against its block's largest."""
    x_NI = _normal(40)
    x_NI[5] *= 100
    x_NI[7, 16:32] = 0
    heard = _heard(x_NI.bfloat16())
    x_NI = x_NI.bfloat16().float()
    norms = x_NI.double().norm(dim=1)
    weights = [min(1.0, (8 * float(norms.sort().values[19]) / float(norm)) ** 2) for norm in norms]
    values, blocks, shape = torch.zeros(bins(6)), torch.zeros(bins(2)), torch.zeros(64)
    for row, weight in zip(x_NI.abs(), weights, strict=True):
        for block in row.split(16):
            peak = block.max()
            if peak > 0:
                blocks[bin_of(peak[None], 2)] += weight
            for value in block[block > 0]:
                values[bin_of(value[None], 6)] += weight
                shape[min(int(value / peak * 64), 63)] += weight * float(peak) ** 2
            if peak > 0:
                shape[0] += weight * float(peak) ** 2 * int((block == 0).sum())
    assert heard.rows == 40
    assert heard.largest == float(x_NI.abs().max())
    for ours, theirs in ((heard.values_V, values), (heard.blocks_K, blocks), (heard.shape_U, shape)):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-6)
    assert weights[5] < 0.1


def test_batches_and_merging_add_up() -> None:
    """In any order; a batch without rows adds nothing, and merging is hearing both."""
    first, second, third = (_normal(30, seed=seed) * 2**seed for seed in range(3))
    whole = _heard(first, second, third)
    _same(_heard(third, first[:0], first, second), whole)
    _same(_heard(first).merge(_heard(second, third)), whole)
    _same(_heard(second, third).merge(_heard(first)), whole)
    empty = RangeSums(64, "cpu").result()
    assert (empty.rows, empty.largest) == (0, 0.0)
    _same(empty.merge(whole), whole)


def test_of_many_rows_some_stand_for_all() -> None:
    """Single values are counted on evenly spaced rows; maxima of blocks on all."""
    x_NI = _normal(1300)
    heard = _heard(x_NI)
    # each stands for 1300 / 434 rows
    assert float(heard.values_V.sum()) == pytest.approx(1300 * 64)
    assert float(heard.blocks_K.sum()) == pytest.approx(1300 * 4)
    whole = _heard(*(x_NI[start : start + 100] for start in range(0, 1300, 100)))
    octaves, expected = (sums.values_V.view(256, -1).sum(1) for sums in (heard, whole))
    assert float((octaves - expected).abs().sum()) < 0.03 * 1300 * 64
    assert torch.equal(heard.blocks_K > 0, whole.blocks_K > 0)


def test_widths_without_blocks() -> None:
    """A matrix whose width is no multiple of 16 has values and a largest one."""
    heard = _heard(_normal(40, 50))
    assert float(heard.values_V.sum()) == pytest.approx(40 * 50)
    assert float(heard.blocks_K.sum()) == 0
    assert heard.largest == float(_normal(40, 50).abs().max())


@pytest.mark.parametrize("spread", [0.0, 2.0])
@pytest.mark.parametrize(("kind", "within"), [("nvfp4", 0.3), ("fp8_static", 0.02)])
def test_expected_errors_are_those_of_rounding(kind: str, within: float, spread: float) -> None:
    """From head-room through the best range into clipping and coarse scales, within what bins tell.

    Values of one magnitude, and of many. The shape of an NVFP4 block is taken to be the same for small and
    large ones, and its bins are 14 to 25 percent wide.
    """
    generator = torch.Generator().manual_seed(3)
    x_NI = _normal(400) * torch.exp(spread * torch.randn(1, 64, generator=generator))
    heard = _heard(x_NI)
    octaves = list(range(20, -24, -1))
    scales = [2.0**octave for octave in octaves]
    errors = nvfp4_errors(heard, octaves) if kind == "nvfp4" else e4m3_errors(heard, scales)
    for scale, expected in zip(scales, errors, strict=True):
        name, stored = ("input_global_scale", 1 / scale) if kind == "nvfp4" else ("input_scale", scale)
        miss = parse_scheme(kind).round_inputs(x_NI, {name: torch.tensor([stored])}) - x_NI
        assert float(expected) == pytest.approx(float(miss.double().square().sum()), rel=within), scale


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_the_widest_range_of_nearly_the_least_error(size: float) -> None:
    """One step wider errs more than the tolerance, or is beyond the head-room."""
    heard = _heard(_normal(200) * size)
    top = math.ceil(math.log2(heard.largest / 448))
    scales = [2.0 ** (step / 4) for step in range(4 * (top + HEAD_ROOM), 4 * (top - 14) - 1, -1)]
    within = e4m3_errors(heard, scales)
    assert best_e4m3_scale(heard) == scales[int((within <= within.min() * (1 + TOLERANCE)).nonzero()[0])]
    top = math.ceil(math.log2(heard.largest / (6 * 448)))
    octaves = list(range(top + HEAD_ROOM, top - 15, -1))
    within = nvfp4_errors(heard, octaves)
    chosen = octaves[int((within <= within.min() * (1 + TOLERANCE)).nonzero()[0])]
    assert best_nvfp4_scale(heard) == 2.0**-chosen


def test_values_that_are_most_of_the_signal_lie_near_the_grid() -> None:
    """Halfway between two of its numbers E4M3 errs by up to 6 percent: another quarter octave saves that."""
    x_NI = 0.01 * _normal(200)
    x_NI[:, 5] = 17.0  # between 16 and 18 if divided by a power of two
    heard = _heard(x_NI)
    scale = best_e4m3_scale(heard)
    chosen, power = e4m3_errors(heard, [scale, 2.0 ** round(math.log2(scale))])
    assert float(chosen) < 0.2 * float(power)


def test_ranges_scale_with_the_inputs() -> None:
    """Inputs 1024 times as large get scales 1024 times as large."""
    small, large = _heard(_normal(200)), _heard(_normal(200) * 1024)
    assert best_e4m3_scale(large) == 1024 * best_e4m3_scale(small)
    assert best_nvfp4_scale(large) == best_nvfp4_scale(small) / 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_largest_of_16_bit_values(dtype: torch.dtype) -> None:
    """Found by their bits: also zeros of either sign, subnormals, infinities and NaN."""
    x_NI = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_NI[1, :16], x_NI[2, 3], x_NI[3, 20] = -0.0, -float("inf"), float("nan")
    x_NI[4] *= 1e-7
    expected = x_NI.float().abs().unflatten(1, (-1, 16)).amax(dim=-1)
    assert torch.equal(_peaks(x_NI).nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
