"""Compiled twins of ``Grid.encode`` and ``Grid.decode`` for the CPU: same results, bit for bit.

As in ``scale_search_cpu``: no fast-math, compiled on first call, kept in memory, interpreter lock released.

Legend: N groups of G values.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import numpy.typing as npt

from compressor.kernels.scale_search_cpu import clipped_ratios, round_e2m1, round_e4m3, round_int
from compressor.numerics.grids import GridKind

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint8]
Encoder = Callable[[Floats, Floats, Floats, np.float32, np.float32, Codes], None]

ZERO = np.float32(0.0)
TWO = np.float32(2.0)
SIX = np.float32(6.0)
SEVEN = np.float32(7.0)
E4M3_NORMAL = np.float32(2.0**-6)
E4M3_STEPS = np.float32(2.0**9)
# fp32's exponent bias less that of E4M3, above three bits of mantissa
REBIAS = np.int32(120 << 3)
MANTISSA_SHIFT = np.int32(20)
MAGNITUDE = np.int32(0x7FFFFFFF)


@numba.njit(nogil=True, error_model="numpy")
def _encode_int(
    w_NG: Floats, scale_N: Floats, zero_N: Floats, low: np.float32, high: np.float32, codes_NG: Codes
) -> None:
    x_G = np.empty(w_NG.shape[1], np.float32)
    bits_G = x_G.view(np.int32)
    for n in range(w_NG.shape[0]):
        clipped_ratios(w_NG[n], scale_N[n], zero_N[n], low, high, x_G)
        round_int(x_G, bits_G)
        codes_G = codes_NG[n]
        for i in range(x_G.size):
            codes_G[i] = np.int32(x_G[i])


@numba.njit(nogil=True, error_model="numpy")
def _encode_e2m1(
    w_NG: Floats, scale_N: Floats, zero_N: Floats, low: np.float32, high: np.float32, codes_NG: Codes
) -> None:
    x_G = np.empty(w_NG.shape[1], np.float32)
    sign_G = np.empty(w_NG.shape[1], np.int32)
    bits_G = x_G.view(np.int32)
    for n in range(w_NG.shape[0]):
        clipped_ratios(w_NG[n], scale_N[n], zero_N[n], low, high, x_G)
        for i in range(x_G.size):
            sign_G[i] = 8 if x_G[i] < ZERO else 0
        round_e2m1(x_G, bits_G)
        codes_G = codes_NG[n]
        for i in range(x_G.size):
            size = abs(x_G[i])
            code = TWO * size if size < TWO else (size + TWO if size < SIX else SEVEN)
            codes_G[i] = np.int32(code) | sign_G[i]


@numba.njit(nogil=True, error_model="numpy")
def _encode_e4m3(
    w_NG: Floats, scale_N: Floats, zero_N: Floats, low: np.float32, high: np.float32, codes_NG: Codes
) -> None:
    x_G = np.empty(w_NG.shape[1], np.float32)
    sign_G = np.empty(w_NG.shape[1], np.int32)
    bits_G = x_G.view(np.int32)
    for n in range(w_NG.shape[0]):
        clipped_ratios(w_NG[n], scale_N[n], zero_N[n], low, high, x_G)
        for i in range(x_G.size):
            sign_G[i] = 0x80 if bits_G[i] < 0 else 0
        round_e4m3(x_G, bits_G)
        codes_G = codes_NG[n]
        for i in range(x_G.size):
            size = abs(x_G[i])
            subnormal = np.int32(size * E4M3_STEPS if size < E4M3_NORMAL else ZERO)
            normal = ((bits_G[i] & MAGNITUDE) >> MANTISSA_SHIFT) - REBIAS
            codes_G[i] = (subnormal if size < E4M3_NORMAL else normal) | sign_G[i]


def encoder(kind: GridKind) -> Encoder:
    """``encode(w_NG, scale_N, zero_N, low, high, codes_NG)``, which fills ``codes_NG``, for a grid."""
    compiled: dict[GridKind, Encoder] = {"int": _encode_int, "e2m1": _encode_e2m1, "e4m3": _encode_e4m3}
    return compiled[kind]


@numba.njit(nogil=True, error_model="numpy")
def decode_codes(
    codes_NG: npt.NDArray[np.uint8], table: Floats, scale_N: Floats, zero_N: Floats, weight_NG: Floats
) -> None:
    """Fills ``weight_NG`` with (value of the code - zero point) * scale; ``table`` has each byte's value."""
    for n in range(codes_NG.shape[0]):
        scale, zero = scale_N[n], zero_N[n]
        codes_G, weight_G = codes_NG[n], weight_NG[n]
        for i in range(codes_G.size):
            weight_G[i] = (table[codes_G[i]] - zero) * scale
