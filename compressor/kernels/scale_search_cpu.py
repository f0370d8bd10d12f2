"""Compiled twin of ``compressor.numerics.scale_search`` for the CPU: same candidates, bit for bit.

Vectorised within a group; the order of the sum is the tree that the torch twin takes. No fast-math. As in
``nvfp4_search_cpu``, importing imports numba, each function compiles on its first call and is kept in memory
only, and the interpreter lock is released.

Legend: N groups of G values, K candidates of each group, C groups in one row of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np
import numpy.typing as npt

from compressor.numerics.grids import GridKind

Floats = npt.NDArray[np.float32]
Kernel = Callable[[Floats, Floats, Floats, Floats, np.float32, np.float32, npt.NDArray[np.int64]], None]

ONE = np.float32(1.0)
TWO = np.float32(2.0)
FOUR = np.float32(4.0)
# adding and subtracting 1.5 * 2**23 * step rounds to multiples of step, ties to even
MAGIC_HALF = np.float32(12582912.0 * 0.5)
MAGIC_ONE = np.float32(12582912.0)
MAGIC_TWO = np.float32(12582912.0 * 2.0)
MAGIC_SUBNORMAL = np.float32(12582912.0 * 2.0**-9)
E4M3_NORMAL = np.float32(2.0**-6)
# rounds the bits of an fp32 to three bits of mantissa, ties to even
KEEP_3_BITS = np.int32(-(1 << 20))
BELOW_HALF = np.int32((1 << 19) - 1)
LAST_BIT = np.int32(20)
BIT = np.int32(1)


@numba.njit(nogil=True, error_model="numpy")
def clipped_ratios(
    w_G: Floats, scale: np.float32, zero: np.float32, low: np.float32, high: np.float32, x_G: Floats
) -> None:
    """Fills ``x_G`` with w / scale + zero, clipped."""
    for i in range(w_G.size):
        x = w_G[i] / scale + zero
        x = low if x < low else x
        x_G[i] = high if x > high else x


@numba.njit(nogil=True, error_model="numpy")
def round_int(x_G: Floats, bits_G: npt.NDArray[np.int32]) -> None:
    """Rounds ``x_G`` (clipped before) to integers in place; ``bits_G`` is the same memory."""
    for i in range(x_G.size):
        x_G[i] = (x_G[i] + MAGIC_ONE) - MAGIC_ONE


@numba.njit(nogil=True, error_model="numpy")
def round_e2m1(x_G: Floats, bits_G: npt.NDArray[np.int32]) -> None:
    """Rounds ``x_G`` (clipped before) to E2M1 in place; ``bits_G`` is the same memory."""
    for i in range(x_G.size):
        size = abs(x_G[i])
        magic = MAGIC_HALF if size < TWO else (MAGIC_ONE if size < FOUR else MAGIC_TWO)
        x_G[i] = (x_G[i] + magic) - magic


@numba.njit(nogil=True, error_model="numpy")
def round_e4m3(x_G: Floats, bits_G: npt.NDArray[np.int32]) -> None:
    """Rounds ``x_G`` (clipped before) to E4M3 in place; ``bits_G`` is the same memory."""
    for i in range(x_G.size):
        subnormal = (x_G[i] + MAGIC_SUBNORMAL) - MAGIC_SUBNORMAL
        if abs(x_G[i]) < E4M3_NORMAL:
            x_G[i] = subnormal
        else:
            bits_G[i] = (bits_G[i] + BELOW_HALF + ((bits_G[i] >> LAST_BIT) & BIT)) & KEEP_3_BITS


@cache
def kernel(kind: GridKind) -> Kernel:
    """``search(w_NG, h_CG, scale_NK, zero_NK, low, high, best_N)``, which fills ``best_N``, for a grid."""
    round_group = {"int": round_int, "e2m1": round_e2m1, "e4m3": round_e4m3}[kind]

    @numba.njit(nogil=True, error_model="numpy")
    def search(
        w_NG: Floats,
        h_CG: Floats,
        scale_NK: Floats,
        zero_NK: Floats,
        low: np.float32,
        high: np.float32,
        best_N: npt.NDArray[np.int64],
    ) -> None:
        size = w_NG.shape[1]
        rounded_G = np.empty(size, np.float32)
        bits_G = rounded_G.view(np.int32)
        terms_G = np.empty(size, np.float32)
        for n in range(w_NG.shape[0]):
            w_G = w_NG[n]
            h_G = h_CG[n % h_CG.shape[0]]
            least = np.float32(np.inf)
            best = 0
            for k in range(scale_NK.shape[1]):
                scale, zero = scale_NK[n, k], zero_NK[n, k]
                clipped_ratios(w_G, scale, zero, low, high, rounded_G)
                round_group(rounded_G, bits_G)
                for i in range(size):
                    miss = w_G[i] - scale * (rounded_G[i] - zero)
                    terms_G[i] = h_G[i] * (miss * miss)
                length = size
                while length > 1:
                    half = length - length // 2
                    first_G, last_G = terms_G[: length // 2], terms_G[half:length]
                    for i in range(length // 2):
                        first_G[i] += last_G[i]
                    length = half
                if k == 0 or terms_G[0] < least:
                    least = terms_G[0]
                    best = k
            best_N[n] = best

    return search  # type: ignore[no-any-return]
