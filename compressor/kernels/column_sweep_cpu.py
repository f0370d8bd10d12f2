"""Compiled twins of ``compressor.numerics.columns`` for the CPU: sweeps over columns, many rows at a time.

Rows are taken in tiles and transposed, so that the compiler vectorises over rows. A row's result depends on
nothing but that row and the order of its columns: it is the same in any tile and any number of threads. Sums
may be contracted to fused multiply-adds, so the torch twin agrees up to rounding, not bit for bit. As in
``scale_search_cpu``: compiled on first call, kept in memory, interpreter lock released.

Legend: O rows, I columns, T rows of one tile, C groups in a row, W columns of a group, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np
import numpy.typing as npt

from compressor.kernels.scale_search_cpu import round_e2m1, round_e4m3, round_int
from compressor.numerics.grids import GridKind

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Sweep = Callable[[Floats, Floats, Floats, Floats, Floats, Ints, np.float32, np.float32, bool], None]
Refit = Callable[
    [Floats, Floats, Floats, Floats, Ints, Floats, Floats, Floats, Floats, np.float32, np.float32], None
]

TILE = 64
UNROLLED = 8
ZERO = np.float32(0.0)


@numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
def subtract_products(acc_T: Floats, a_I: Floats, x_IT: Floats, start: int, stop: int) -> None:
    """``acc -= sum of a[k] x[k]`` over k from start to stop, eight at a time."""
    k = start
    while k + UNROLLED <= stop:
        a0, a1, a2, a3 = a_I[k], a_I[k + 1], a_I[k + 2], a_I[k + 3]
        a4, a5, a6, a7 = a_I[k + 4], a_I[k + 5], a_I[k + 6], a_I[k + 7]
        for t in range(TILE):
            first = (a0 * x_IT[k, t] + a1 * x_IT[k + 1, t]) + (a2 * x_IT[k + 2, t] + a3 * x_IT[k + 3, t])
            last = (a4 * x_IT[k + 4, t] + a5 * x_IT[k + 5, t]) + (a6 * x_IT[k + 6, t] + a7 * x_IT[k + 7, t])
            acc_T[t] -= first + last
        k += UNROLLED
    while k < stop:
        a = a_I[k]
        for t in range(TILE):
            acc_T[t] -= a * x_IT[k, t]
        k += 1


@numba.njit(nogil=True, error_model="numpy")
def _load(values_OI: Floats, start: int, tile_IT: Floats) -> None:
    """Transposes the tile of rows from ``start`` on; rows after the last are zero."""
    width = min(TILE, values_OI.shape[0] - start)
    for i in range(values_OI.shape[1]):
        for t in range(TILE):
            tile_IT[i, t] = ZERO
    for t in range(width):
        for i in range(values_OI.shape[1]):
            tile_IT[i, t] = values_OI[start + t, i]


@numba.njit(nogil=True, error_model="numpy")
def _store(tile_IT: Floats, start: int, values_OI: Floats) -> None:
    for t in range(min(TILE, values_OI.shape[0] - start)):
        for i in range(values_OI.shape[1]):
            values_OI[start + t, i] = tile_IT[i, t]


@numba.njit(nogil=True, error_model="numpy")
def _load_scales(scale_OC: Floats, start: int, scale_CT: Floats) -> None:
    """As ``_load``, but rows after the last have scale 1: nothing is divided by zero."""
    width = min(TILE, scale_OC.shape[0] - start)
    for c in range(scale_OC.shape[1]):
        for t in range(TILE):
            scale_CT[c, t] = scale_OC[start + t, c] if t < width else np.float32(1.0)


@cache
def sweep_kernel(kind: GridKind) -> Sweep:
    """``sweep(target_OI, chosen_OI, scale_OC, zero_OC, a_II, group_I, low, high, first)`` for a grid.

    Column by column, ``chosen`` becomes the lattice value nearest to ``target[j] - sum of a[j, k] e[k]``,
    where e = chosen - target: over all k (``a``'s diagonal is zero), or over k < j alone if ``first`` (what
    ``chosen`` held before is then not read).
    """
    round_tile = {"int": round_int, "e2m1": round_e2m1, "e4m3": round_e4m3}[kind]

    @numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
    def sweep(
        target_OI: Floats,
        chosen_OI: Floats,
        scale_OC: Floats,
        zero_OC: Floats,
        a_II: Floats,
        group_I: Ints,
        low: np.float32,
        high: np.float32,
        first: bool,
    ) -> None:
        columns = target_OI.shape[1]
        target_IT = np.empty((columns, TILE), np.float32)
        chosen_IT = np.empty((columns, TILE), np.float32)
        error_IT = np.zeros((columns, TILE), np.float32)
        scale_CT = np.empty((scale_OC.shape[1], TILE), np.float32)
        zero_CT = np.empty((scale_OC.shape[1], TILE), np.float32)
        x_T = np.empty(TILE, np.float32)
        bits_T = x_T.view(np.int32)
        for start in range(0, target_OI.shape[0], TILE):
            _load(target_OI, start, target_IT)
            _load_scales(scale_OC, start, scale_CT)
            _load(zero_OC, start, zero_CT)
            if not first:
                _load(chosen_OI, start, chosen_IT)
                for j in range(columns):
                    for t in range(TILE):
                        error_IT[j, t] = chosen_IT[j, t] - target_IT[j, t]
            for j in range(columns):
                scale_T, zero_T = scale_CT[group_I[j]], zero_CT[group_I[j]]
                target_T, chosen_T, error_T = target_IT[j], chosen_IT[j], error_IT[j]
                for t in range(TILE):
                    x_T[t] = target_T[t]
                subtract_products(x_T, a_II[j], error_IT, 0, j if first else columns)
                for t in range(TILE):
                    x = x_T[t] / scale_T[t] + zero_T[t]
                    x = low if x < low else x
                    x_T[t] = high if x > high else x
                round_tile(x_T, bits_T)
                for t in range(TILE):
                    chosen_T[t] = (x_T[t] - zero_T[t]) * scale_T[t]
                    error_T[t] = chosen_T[t] - target_T[t]
            _store(chosen_IT, start, chosen_OI)

    return sweep  # type: ignore[no-any-return]


def _trials_kernel(kind: GridKind) -> Callable[..., None]:
    """Tries each candidate scale on one group of a tile; ``now_WT`` and ``best_T`` get what errs least."""
    round_tile = {"int": round_int, "e2m1": round_e2m1, "e4m3": round_e4m3}[kind]

    @numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
    def try_scales(
        centre_WT: Floats,
        now_WT: Floats,
        trial_WT: Floats,
        error_WT: Floats,
        a_WW: Floats,
        d_W: Floats,
        scale_TK: Floats,
        zero_TK: Floats,
        low: np.float32,
        high: np.float32,
        best_T: Ints,
    ) -> None:
        width, candidates = centre_WT.shape[0], scale_TK.shape[1]
        x_T = np.empty(TILE, np.float32)
        v_T = np.empty(TILE, np.float32)
        bits_T = x_T.view(np.int32)
        scale_T, zero_T = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        cost_T, least_T = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        kept_WT = now_WT.copy()
        for k in range(-1, candidates):
            for t in range(TILE):
                cost_T[t] = ZERO
                scale_T[t] = scale_TK[t, max(k, 0)]
                zero_T[t] = zero_TK[t, max(k, 0)]
            for j in range(width):
                for t in range(TILE):
                    v_T[t] = centre_WT[j, t]
                subtract_products(v_T, a_WW[j], error_WT, 0, j)
                if k >= 0:
                    for t in range(TILE):
                        x = v_T[t] / scale_T[t] + zero_T[t]
                        x = low if x < low else x
                        x_T[t] = high if x > high else x
                    round_tile(x_T, bits_T)
                    for t in range(TILE):
                        trial_WT[j, t] = (x_T[t] - zero_T[t]) * scale_T[t]
                else:
                    for t in range(TILE):
                        trial_WT[j, t] = now_WT[j, t]
                for t in range(TILE):
                    miss = trial_WT[j, t] - v_T[t]
                    cost_T[t] += d_W[j] * (miss * miss)
                    error_WT[j, t] = trial_WT[j, t] - centre_WT[j, t]
            for t in range(TILE):
                if k < 0:
                    least_T[t] = cost_T[t]
                    best_T[t] = 0
                elif cost_T[t] < least_T[t]:
                    least_T[t] = cost_T[t]
                    best_T[t] = k
                    for j in range(width):
                        kept_WT[j, t] = trial_WT[j, t]
        for j in range(width):
            for t in range(TILE):
                now_WT[j, t] = kept_WT[j, t]

    return try_scales  # type: ignore[no-any-return]


@cache
def refit_kernel(kind: GridKind) -> Refit:
    """``refit``, which overwrites ``chosen_OI`` and fills ``best_OC``; see ``numerics.columns.refit``.

    Group by group, given what the other groups hold: each candidate scale rounds the group's columns in turn
    as ``sweep`` does, and the group becomes what errs least, if less than what it holds now (candidate 0).
    """
    try_scales = _trials_kernel(kind)

    @numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
    def refit(
        target_OI: Floats,
        chosen_OI: Floats,
        scale_OCK: Floats,
        zero_OCK: Floats,
        best_OC: Ints,
        h_II: Floats,
        inverse_CWW: Floats,
        a_CWW: Floats,
        d_CW: Floats,
        low: np.float32,
        high: np.float32,
    ) -> None:
        rows, columns = target_OI.shape
        groups, width = d_CW.shape
        target_IT = np.empty((columns, TILE), np.float32)
        chosen_IT = np.empty((columns, TILE), np.float32)
        error_IT = np.empty((columns, TILE), np.float32)
        pull_WT = np.empty((width, TILE), np.float32)
        centre_WT = np.empty((width, TILE), np.float32)
        trial_WT = np.empty((width, TILE), np.float32)
        miss_WT = np.empty((width, TILE), np.float32)
        scale_TK = np.ones((TILE, scale_OCK.shape[2]), np.float32)
        zero_TK = np.zeros((TILE, scale_OCK.shape[2]), np.float32)
        best_T = np.empty(TILE, np.int32)
        for start in range(0, rows, TILE):
            size = min(TILE, rows - start)
            _load(target_OI, start, target_IT)
            _load(chosen_OI, start, chosen_IT)
            for j in range(columns):
                for t in range(TILE):
                    error_IT[j, t] = chosen_IT[j, t] - target_IT[j, t]
            for c in range(groups):
                first, last = c * width, (c + 1) * width
                for j in range(width):
                    for t in range(TILE):
                        pull_WT[j, t] = ZERO
                    subtract_products(pull_WT[j], h_II[first + j], error_IT, 0, first)
                    subtract_products(pull_WT[j], h_II[first + j], error_IT, last, columns)
                for j in range(width):
                    for t in range(TILE):
                        centre_WT[j, t] = ZERO
                    subtract_products(centre_WT[j], inverse_CWW[c, j], pull_WT, 0, width)
                    for t in range(TILE):
                        centre_WT[j, t] = target_IT[first + j, t] - centre_WT[j, t]
                for t in range(size):
                    for k in range(scale_TK.shape[1]):
                        scale_TK[t, k] = scale_OCK[start + t, c, k]
                        zero_TK[t, k] = zero_OCK[start + t, c, k]
                now_WT = chosen_IT[first:last]
                a_WW, d_W = a_CWW[c], d_CW[c]
                try_scales(
                    centre_WT, now_WT, trial_WT, miss_WT, a_WW, d_W, scale_TK, zero_TK, low, high, best_T
                )
                for j in range(width):
                    for t in range(TILE):
                        error_IT[first + j, t] = now_WT[j, t] - target_IT[first + j, t]
                for t in range(size):
                    best_OC[start + t, c] = best_T[t]
            _store(chosen_IT, start, chosen_OI)

    return refit  # type: ignore[no-any-return]
