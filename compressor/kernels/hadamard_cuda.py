"""Triton twin of ``compressor.numerics.hadamard.fast_hadamard``: the same sums in the same order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hadamard(x, ROWS: tl.constexpr, D: tl.constexpr, STEPS: tl.constexpr):
    """The tile [ROWS, D] times the Hadamard matrix of ones; D is 2**STEPS."""
    for step in tl.static_range(STEPS):
        pairs = tl.reshape(x, [ROWS, D >> (step + 1), 2, 1 << step])
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        pairs = tl.join(first + second, first - second)
        x = tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), [ROWS, D])
    return x
