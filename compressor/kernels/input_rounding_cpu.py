"""Compiled twin of ``schemes.inputs.round_rows`` for the CPU: inputs rounded bit for bit as torch does.

As in ``scale_search_cpu``: no fast-math, compiled on first call, kept in memory, interpreter lock released.
What is not finite comes out as torch's arithmetic has it, so that a pass that went wrong is not hidden.

Legend: N groups of G values that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np
import numpy.typing as npt
import torch

from compressor.kernels import as_array, in_threads
from compressor.kernels.input_rounding import ScaleKind
from compressor.kernels.scale_search_cpu import round_e2m1, round_e4m3, round_int
from compressor.numerics.grids import Grid, GridKind
from compressor.numerics.groups import row_chunks

Floats = npt.NDArray[np.float32]
Kernel = Callable[[Floats, int, np.float32, np.float32, np.float32, np.float32, np.float32], None]

# Of ``ScaleKind``, as compiled code has them.
_KINDS: dict[ScaleKind, int] = {"stored": 0, "own": 1, "e4m3": 2}
STORED, E4M3 = 0, 2
ZERO = np.float32(0.0)
E4M3_LARGEST = np.float32(448.0)
MAGNITUDE = np.int32(0x7FFFFFFF)
SIGN = np.int32(-(1 << 31))


@cache
def kernel(kind: GridKind) -> Kernel:
    """``round_all(x_NG, scale_kind, given, half_range, smallest, low, high)``, in place, for a grid."""
    round_group = {"int": round_int, "e2m1": round_e2m1, "e4m3": round_e4m3}[kind]

    @numba.njit(nogil=True, error_model="numpy")
    def round_all(
        x_NG: Floats,
        scale_kind: int,
        given: np.float32,
        half_range: np.float32,
        smallest: np.float32,
        low: np.float32,
        high: np.float32,
    ) -> None:
        size = x_NG.shape[1]
        ratio_G = np.empty(size, np.float32)
        rounded_G = np.empty(size, np.float32)
        bits_G = rounded_G.view(np.int32)
        scale_1 = np.empty(1, np.float32)
        scale_bits_1 = scale_1.view(np.int32)
        # A dynamic scale's zero point of 0 makes 0 of -0: only ratios below 0 keep their sign.
        keeps_zero = scale_kind == STORED
        for n in range(x_NG.shape[0]):
            x_G = x_NG[n]
            scale = given
            if scale_kind != STORED:
                # the bits of magnitudes order as the magnitudes do, NaN last
                in_bits_G = x_G.view(np.int32)
                peak = np.int32(0)
                for i in range(size):
                    peak = max(peak, in_bits_G[i] & MAGNITUDE)
                scale_bits_1[0] = peak
                scale = scale_1[0] / half_range
                if scale_kind == E4M3:
                    scale_1[0] = scale * given
                    if scale_1[0] == scale_1[0]:
                        scale_1[0] = min(scale_1[0], E4M3_LARGEST)
                        round_e4m3(scale_1, scale_bits_1)
                    scale = scale_1[0]
                if scale == ZERO:
                    scale = smallest
                if scale_kind == E4M3:
                    scale = scale / given
            for i in range(size):
                ratio = x_G[i] / scale
                ratio_G[i] = ratio
                ratio = low if ratio < low else ratio
                ratio = high if ratio > high else ratio
                rounded_G[i] = abs(ratio)
            round_group(rounded_G, bits_G)
            ratio_bits_G = ratio_G.view(np.int32)
            for i in range(size):
                negative = ratio_bits_G[i] < 0 if keeps_zero else ratio_G[i] < ZERO
                bits_G[i] |= SIGN if negative else np.int32(0)
            for i in range(size):
                x_G[i] = (rounded_G[i] if ratio_G[i] == ratio_G[i] else ratio_G[i]) * scale

    return round_all  # type: ignore[no-any-return]


def round_groups(
    x_NI: torch.Tensor,
    size: int,
    grid: Grid,
    kind: ScaleKind,
    given: torch.Tensor | None,
    *,
    half_range: float,
    smallest: float,
) -> torch.Tensor:
    """The inputs [N, I] rounded, in their own dtype; arguments as ``input_rounding_cuda.round_groups``.

    Memory beside the result: one chunk of rows in fp32, none where the inputs are.
    """
    round_all = kernel(grid.kind)
    numbers = [0.0 if given is None else float(given), half_range, smallest, grid.low, grid.high]
    constants = [np.float32(number) for number in numbers]
    rounded_NI = torch.empty_like(x_NI, memory_format=torch.contiguous_format)
    in_place = x_NI.dtype == torch.float32
    for rows in row_chunks(*x_NI.shape):
        part_NI = x_NI[rows]
        wide_NI = rounded_NI[rows] if in_place else torch.empty(part_NI.shape)
        x_NG = as_array(wide_NI.copy_(part_NI).view(-1, size))

        def work(part: slice, x_NG: Floats = x_NG) -> None:
            round_all(x_NG[part], _KINDS[kind], *constants)

        in_threads(work, len(x_NG), x_NG.size)
        if not in_place:
            rounded_NI[rows] = wide_NI
    return rounded_NI
