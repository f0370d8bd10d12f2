"""Compiled twin of ``compressor.numerics.nvfp4_search`` for the CPU: same codes, bit for bit.

Blocks are taken in tiles and transposed, so that the compiler vectorises over blocks while the sum within a
block keeps its order; no fast-math, so nothing is contracted or reordered. Importing this module imports
numba; a function compiles on its first call and is kept in memory only. Threads are the caller's: the
compiled functions release the interpreter lock.

Legend: N blocks, T blocks of one tile, C blocks of one row of the matrix.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from compressor.numerics.nvfp4_search import BLOCK, LOW_CODES, REACH, ZERO_BLOCK_CODE

TILE = 64
LAST_CODE = 126

Floats = npt.NDArray[np.float32]

ZERO = np.float32(0.0)
TWO = np.float32(2.0)
FOUR = np.float32(4.0)
REACH_FACTOR = np.float32(REACH)
SIX = np.float32(6.0)
# adding and subtracting 1.5 * 2**23 * step rounds to multiples of step, ties to even
MAGIC_HALF = np.float32(12582912.0 * 0.5)
MAGIC_ONE = np.float32(12582912.0)
MAGIC_TWO = np.float32(12582912.0 * 2.0)


@numba.njit(nogil=True, error_model="numpy")
def _errors(u_16T: Floats, h_16T: Floats, scale_T: Floats, error_T: Floats) -> None:
    for t in range(TILE):
        error_T[t] = ZERO
    for i in range(BLOCK):
        for t in range(TILE):
            scale = scale_T[t]
            ratio = min(u_16T[i, t] / scale, SIX)
            magic = MAGIC_HALF if ratio < TWO else (MAGIC_ONE if ratio < FOUR else MAGIC_TWO)
            miss = u_16T[i, t] - scale * ((ratio + magic) - magic)
            error_T[t] += h_16T[i, t] * (miss * miss)


@numba.njit(nogil=True, error_model="numpy")
def _clipped(u_16T: Floats, h_16T: Floats, scale_T: Floats, error_T: Floats) -> None:
    for t in range(TILE):
        error_T[t] = ZERO
    for i in range(BLOCK):
        for t in range(TILE):
            miss = max(u_16T[i, t] - SIX * scale_T[t], ZERO)
            error_T[t] += h_16T[i, t] * (miss * miss)


@numba.njit(nogil=True, error_model="numpy")
def _load(u_N16: Floats, h_C16: Floats, start: int, u_16T: Floats, h_16T: Floats, amax_T: Floats) -> int:
    """Transposes the tile from block ``start`` on, zeros after the last; returns how many blocks it has."""
    width = int(min(TILE, u_N16.shape[0] - start))
    for t in range(TILE):
        amax_T[t] = ZERO
        for i in range(BLOCK):
            u_16T[i, t] = ZERO
    for t in range(width):
        n = start + t
        for i in range(BLOCK):
            u_16T[i, t] = abs(u_N16[n, i])
            h_16T[i, t] = h_C16[n % h_C16.shape[0], i]
    for i in range(BLOCK):
        for t in range(TILE):
            amax_T[t] = max(amax_T[t], u_16T[i, t])
    return width


@numba.njit(nogil=True, error_model="numpy")
def _first_codes(amax_T: Floats, ladder: Floats, base_T: npt.NDArray[np.int64]) -> int:
    """The smallest codes that reach the largest values; returns how many above them may win in some block."""
    span = 0
    for t in range(TILE):
        base = 1
        while base < LAST_CODE and ladder[base] * SIX < amax_T[t]:
            base += 1
        base_T[t] = base
        if amax_T[t] > ZERO:
            last = base
            while last < LAST_CODE and (last < LOW_CODES or ladder[last + 1] * REACH_FACTOR < amax_T[t]):
                last += 1
            span = max(span, last - base)
    return span


@numba.njit(nogil=True, error_model="numpy")
def search(u_N16: Floats, h_C16: Floats, ladder: Floats, codes_N: npt.NDArray[np.uint8]) -> None:
    """Fills ``codes_N`` with the best E4M3 code of each block.

    Args:
        u_N16: the weights times the tensor-level scale.
        h_C16: importance of the C blocks of one row; block n has ``h_C16[n % C]``.
        ladder: [127] the value of each code.
        codes_N: the result.
    """
    u_16T, h_16T = np.zeros((BLOCK, TILE), np.float32), np.zeros((BLOCK, TILE), np.float32)
    amax_T, scale_T = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    error_T, least_T = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    base_T, best_T = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    for start in range(0, u_N16.shape[0], TILE):
        width = _load(u_N16, h_C16, start, u_16T, h_16T, amax_T)
        span = _first_codes(amax_T, ladder, base_T)
        for t in range(TILE):
            best_T[t] = base_T[t]
            scale_T[t] = ladder[base_T[t]]
        _errors(u_16T, h_16T, scale_T, least_T)
        for k in range(1, span + 1):
            for t in range(TILE):
                scale_T[t] = ladder[min(base_T[t] + k, LAST_CODE)]
            _errors(u_16T, h_16T, scale_T, error_T)
            for t in range(TILE):
                if error_T[t] < least_T[t]:
                    least_T[t] = error_T[t]
                    best_T[t] = min(base_T[t] + k, LAST_CODE)
        for k in range(1, LAST_CODE):
            for t in range(TILE):
                scale_T[t] = ladder[max(base_T[t] - k, 1)]
            _clipped(u_16T, h_16T, scale_T, error_T)
            alive = False
            for t in range(TILE):
                alive |= (base_T[t] > k) & (amax_T[t] > ZERO) & (error_T[t] <= least_T[t])
            if not alive:
                break
            _errors(u_16T, h_16T, scale_T, error_T)
            for t in range(TILE):
                if error_T[t] <= least_T[t]:  # the smaller code wins a tie
                    least_T[t] = error_T[t]
                    best_T[t] = max(base_T[t] - k, 1)
        for t in range(width):
            codes_N[start + t] = best_T[t] if amax_T[t] > ZERO else ZERO_BLOCK_CODE
