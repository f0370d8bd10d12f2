"""How large a matrix's inputs are: what calibration hears of them, and what rounding them would cost.

Legend: N rows (tokens) of a batch, I in_features, E candidate scales; bins: V of the magnitudes of values, K
of the largest ones of blocks, U of a value over the largest of its block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, isfinite

import torch

from compressor.numerics.fp4 import E2M1_MAX, round_e2m1_magnitude
from compressor.numerics.fp8 import E4M3_MAX, to_e4m3
from compressor.numerics.row_weights import row_weights

# Magnitudes are binned by exponent and the first bits of the mantissa of their fp32 form. E4M3 has three such
# bits: what it makes of a value is known from six to a fraction of its step.
VALUE_BITS = 6
BLOCK_BITS = 2
SHAPE_BINS = 64
BLOCK = 16
# Of a batch of more rows, as many, evenly spaced, stand for all where single values are counted.
SAMPLED_ROWS = 512
# Candidates: from so many octaves above the range heard to so many below.
HEAD_ROOM = 4
CLIPPED = 14
# The widest range is taken whose expected error is within this of the least: other text has other outliers.
TOLERANCE = 0.005
# What a block scale of 0 becomes (compressed_tensors@0.19 quantization/utils/helpers.py).
E4M3_FOR_ZERO = 0.125


@dataclass(frozen=True)
class InputRange:
    """What calibration heard of the inputs that some matrices share; rows count by ``row_weights``.

    Attributes:
        largest: the largest magnitude; 0 if nothing was heard, NaN or infinite if an input was.
        rows: how many rows were heard.
        values_V: fp64, the weight of all values of each magnitude (``bin_of`` with ``VALUE_BITS``).
        blocks_K: fp64, the weight of all blocks of 16 whose largest value has that magnitude (with
            ``BLOCK_BITS``); zeros where in_features is no multiple of 16.
        shape_U: fp64, the weight of all values of such blocks that are that large against the largest, blocks
            counting by its square.
    """

    largest: float
    rows: int
    values_V: torch.Tensor
    blocks_K: torch.Tensor
    shape_U: torch.Tensor

    def merge(self, other: InputRange) -> InputRange:
        """What was heard of both together: of the experts of a layer, say, which engines give one scale."""
        larger = self.largest > other.largest or not isfinite(self.largest)
        return InputRange(
            self.largest if larger else other.largest,
            self.rows + other.rows,
            self.values_V + other.values_V,
            self.blocks_K + other.blocks_K,
            self.shape_U + other.shape_U,
        )


class RangeSums:
    """Gathers an ``InputRange`` in one pass; for the same batches in any order the same, but for rounding.

    Args:
        in_features: I.
        device: where the inputs are; the sums take 140 KB there.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self._blocks = in_features % BLOCK == 0
        self._largest = torch.zeros((), device=device)
        self._rows = 0
        self._values_V = torch.zeros(bins(VALUE_BITS), dtype=torch.float64, device=device)
        self._blocks_K = torch.zeros(bins(BLOCK_BITS), dtype=torch.float64, device=device)
        self._shape_U = torch.zeros(SHAPE_BINS, dtype=torch.float64, device=device)

    def add(self, x_NI: torch.Tensor) -> None:
        """Adds a batch of any float dtype; one without rows adds nothing."""
        rows = len(x_NI)
        if rows == 0:
            return
        self._rows += rows
        weight_N = row_weights(x_NI)
        stride = -(-rows // SAMPLED_ROWS)
        some_NI = x_NI[::stride].float().abs()
        some_weight_N = weight_N[::stride] * (rows / len(some_NI))
        self._values_V += _histogram(some_NI, some_weight_N, VALUE_BITS)
        if self._blocks:
            peak_NC = _peaks(x_NI)
            self._blocks_K += _histogram(peak_NC, weight_N, BLOCK_BITS)
            self._shape_U += _shape(some_NI, peak_NC[::stride], some_weight_N)
            peak = peak_NC.max()
        else:
            peak = x_NI.abs().max().float()
        # torch.maximum passes NaN on, so an input that is not finite is not forgotten
        self._largest = torch.maximum(self._largest, peak)

    def result(self) -> InputRange:
        """What has been gathered, on the CPU."""
        sums = (self._values_V.cpu(), self._blocks_K.cpu(), self._shape_U.cpu())
        return InputRange(float(self._largest), self._rows, *sums)


def best_e4m3_scale(heard: InputRange) -> float:
    """What inputs are divided by before they are rounded to E4M3, for all of the tensor.

    E4M3 is a floating-point format, so octaves differ only by what is clipped or too small. Within one, a
    quarter more or less puts those few values that are most of the signal nearer to the grid or farther away.
    """
    top = _octave(heard.largest / E4M3_MAX)
    scales: list[float] = [
        2.0 ** (step / 4) for step in range(4 * (top + HEAD_ROOM), 4 * (top - CLIPPED) - 1, -1)
    ]
    return scales[_widest(e4m3_errors(heard, scales))]


def best_nvfp4_scale(heard: InputRange) -> float:
    """The power of two that NVFP4's block scales are stored relative to (``input_global_scale``).

    The scale of a block with the largest value a is the E4M3 nearest to a / 6 times this: too large clips the
    largest blocks, too small leaves the small ones with a coarse scale or none. A power of two is exact in
    every dtype, and so is its reciprocal: engines that multiply and engines that divide compute the same.
    """
    top = _octave(heard.largest / (E2M1_MAX * E4M3_MAX))
    exponents = list(range(top + HEAD_ROOM, top - CLIPPED - 1, -1))
    return 2.0 ** -exponents[_widest(nvfp4_errors(heard, exponents))]


def e4m3_errors(heard: InputRange, scales: list[float]) -> torch.Tensor:
    """fp64 [E]: expected squared error, summed, of inputs rounded to E4M3 times each scale."""
    used = heard.values_V.nonzero().flatten()
    weight_V, size_V = heard.values_V[used], bin_centres(VALUE_BITS)[used]
    errors = []
    for scale in scales:
        rounded_V = to_e4m3((size_V / scale).float()).double() * scale
        errors.append((weight_V * (size_V - rounded_V).square()).sum())
    return torch.stack(errors)


def nvfp4_errors(heard: InputRange, exponents: list[int]) -> torch.Tensor:
    """fp64 [E]: the same of inputs rounded to NVFP4 with ``input_global_scale`` 2**-exponent."""
    used = heard.blocks_K.nonzero().flatten()
    # a block scale is rounded to steps of 1/8 octave, finer than a bin: four values stand for each bin
    parts = torch.tensor([-0.375, -0.125, 0.125, 0.375], dtype=torch.float64)
    size_K4 = bin_centres(BLOCK_BITS)[used, None] + bin_widths(BLOCK_BITS)[used, None] * parts
    weight_K1 = heard.blocks_K[used, None] / len(parts)
    share_U = heard.shape_U / heard.shape_U.sum()
    u_U = (torch.arange(SHAPE_BINS, dtype=torch.float64) + 0.5) / SHAPE_BINS
    errors = []
    for exponent in exponents:
        wanted_K4 = size_K4 / E2M1_MAX / 2.0**exponent
        scale_K4 = to_e4m3(wanted_K4.float()).double()
        scale_K4 = torch.where(scale_K4 == 0, E4M3_FOR_ZERO, scale_K4)
        # of a block whose largest value is 1
        step_K41 = (scale_K4 / wanted_K4 / E2M1_MAX)[..., None]
        rounded_K4U = round_e2m1_magnitude((u_U / step_K41).float()).double() * step_K41
        miss_K4 = ((u_U - rounded_K4U).square() * share_U).sum(dim=-1)
        errors.append(BLOCK * (weight_K1 * miss_K4 * size_K4.square()).sum())
    return torch.stack(errors)


def bins(bits: int) -> int:
    """How many bins there are with so many bits of the mantissa."""
    return 256 << bits


def bin_of(x: torch.Tensor, bits: int) -> torch.Tensor:
    """int64: the bin of each fp32 magnitude."""
    return (x.contiguous().view(torch.int32) >> (23 - bits)).long()


def bin_centres(bits: int) -> torch.Tensor:
    """fp64: the middle of each bin; 0 of those of numbers that are not finite."""
    return _bin_starts(bits) + bin_widths(bits) / 2


def bin_widths(bits: int) -> torch.Tensor:
    """fp64: the width of each bin."""
    starts = _bin_starts(bits)
    return starts.diff(append=starts[-1:]).clamp(min=0.0)


def _bin_starts(bits: int) -> torch.Tensor:
    codes = torch.arange(bins(bits), dtype=torch.int32) << (23 - bits)
    starts = codes.view(torch.float32).double()
    return torch.where(starts.isfinite(), starts, 0.0)


def _peaks(x_NI: torch.Tensor) -> torch.Tensor:
    """fp32 [N, C]: the largest magnitude of each block; NaN where there is one."""
    if x_NI.element_size() != 2:
        return x_NI.reshape(len(x_NI), -1, BLOCK).abs().amax(dim=-1).float()
    # without its sign, the bits of a 16-bit value order as its magnitude does: integers are compared faster
    bits_NI = x_NI.contiguous().view(torch.int16) & 0x7FFF
    return bits_NI.view(len(x_NI), -1, BLOCK).amax(dim=-1).view(x_NI.dtype).float()


def _histogram(x_NC: torch.Tensor, weight_N: torch.Tensor, bits: int) -> torch.Tensor:
    """fp64: the weight of each bin's values; zeros are left out, since nothing rounds them."""
    weight_NC = torch.where(x_NC > 0, weight_N[:, None].double(), 0.0)
    return torch.bincount(bin_of(x_NC, bits).flatten(), weights=weight_NC.flatten(), minlength=bins(bits))


def _shape(x_NI: torch.Tensor, peak_NC: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """fp64 [U]: see ``InputRange.shape_U``."""
    ratio_NCB = x_NI.reshape(*peak_NC.shape, BLOCK) / peak_NC[..., None]
    index_NCB = (ratio_NCB * SHAPE_BINS).nan_to_num(nan=0.0).long().clamp(0, SHAPE_BINS - 1)
    weight_NC = weight_N[:, None].double() * peak_NC.double().square()
    weights = weight_NC[..., None].expand_as(ratio_NCB)
    return torch.bincount(index_NCB.flatten(), weights=weights.flatten(), minlength=SHAPE_BINS)


def _octave(value: float) -> int:
    """The least exponent whose power of two is not below ``value``."""
    mantissa, exponent = frexp(value)
    return exponent - 1 if mantissa == 0.5 else exponent


def _widest(errors: torch.Tensor) -> int:
    """The first index whose error is nearly the least."""
    return int((errors <= errors.min() * (1 + TOLERANCE)).nonzero()[0])
