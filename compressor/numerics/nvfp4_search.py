"""Search over the E4M3 block scales of NVFP4, in torch; ``compressor.kernels`` holds the compiled twin.

A block is 16 values u (the weight times the tensor-level scale, so that the scale of the block IS its E4M3
value c). The search minimises, with h > 0 the importance of each channel and R rounding to E2M1,

    E(c) = sum_i h_i (|u_i| - c R(|u_i| / c))^2

over the 126 positive finite codes, and takes the smallest code where several have the least error. It is
evaluated in fp32, each operation rounded to nearest, the sum taken in the order i = 0 ... 15, so that every
implementation finds the same code. A block of zeros takes 0.125, as ``compressed_tensors`` gives it.

Codes that cannot win are skipped. Let m = max |u_i|, and let b be the smallest code with 6 c_b >= m (or 126).

*Upwards.* Let c be a code, c/2 a code too, and 3.5 c >= m. With a_i = fl(|u_i| / c) <= 3.5, the quotient for
c/2 is exactly 2 a_i: halving c changes an exponent only. The grid of c/2, (c/2) {0, .5, 1, 1.5, 2, 3, 4, 6},
holds every point of the grid of c up to 3c, its last.
(1) a_i <= 3: its nearest point is at least as near. Where a_i is exactly between two of its points, the ties
to even of both grids pick the same one (checked for all the midpoints .125, .375, .625, .875, 1.25, 1.75,
2.5), and elsewhere rounding the quotient cannot carry it across a midpoint: midpoints are fp32 numbers.
(2) 3 < a_i <= 3.5: c/2 gives 3c. So does c, but for a_i = 3.5, which goes to 4c; as |u_i| <= 3.5 c, that is
no nearer.
Hence each term, which is rounded monotonically, and with it E, is no larger at c/2, the smaller code. So c
can win only if 3.5 c < m, or if c/2 is no code: that is so for the odd codes below 16 (subnormal c/2), and
all codes below 16 are kept.

*Downwards.* For c < c_b, E(c) >= L(c) = sum_i h_i max(|u_i| - 6c, 0)^2: a clipped value contributes exactly
its term, any other at least zero, and fp32 addition is monotone. L grows as c falls. Once L(c) exceeds the
least error found, neither c nor any smaller code can win.

Legend: N blocks, C blocks in one row of the matrix.
"""

from __future__ import annotations

import torch

from compressor.numerics.fp4 import E2M1_MAX, round_e2m1_magnitude
from compressor.numerics.fp8 import E4M3_CODES, e4m3_ladder

BLOCK = 16
ZERO_BLOCK_CODE = 0x20  # 0.125
REACH = 3.5  # codes that reach the largest value so many times over lose to half of them
LOW_CODES = 15  # codes up to here are always tried: half of one need not be a code


def first_code(amax_N: torch.Tensor, ladder: torch.Tensor) -> torch.Tensor:
    """int64 [N]: the smallest code whose grid reaches ``amax_N``, at least 1, at most 126."""
    return torch.searchsorted(ladder * E2M1_MAX, amax_N).clamp(1, E4M3_CODES)


def block_error(u_N16: torch.Tensor, h_N16: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """fp32 [N]: E(c) of non-negative ``u_N16`` for one scale a block, summed in order."""
    error_N = torch.zeros_like(scale_N)
    for i in range(BLOCK):
        u_N = u_N16[:, i]
        miss_N = u_N - scale_N * round_e2m1_magnitude(u_N / scale_N)
        error_N = error_N + h_N16[:, i] * (miss_N * miss_N)
    return error_N


def _clipped(u_N16: torch.Tensor, h_N16: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    error_N = torch.zeros_like(scale_N)
    for i in range(BLOCK):
        miss_N = (u_N16[:, i] - E2M1_MAX * scale_N).clamp(min=0.0)
        error_N = error_N + h_N16[:, i] * (miss_N * miss_N)
    return error_N


def search_codes(u_N16: torch.Tensor, h_C16: torch.Tensor) -> torch.Tensor:
    """uint8 [N]: the best E4M3 code of each block.

    Args:
        u_N16: fp32, the weights times the tensor-level scale; finite.
        h_C16: fp32, importance of the values of one row of blocks, positive, at most about 1; block n has
            ``h_C16[n % C]``.
    """
    u_N16 = u_N16.abs()
    h_N16 = h_C16.repeat(len(u_N16) // len(h_C16), 1)
    ladder = e4m3_ladder(u_N16.device)
    amax_N = u_N16.amax(dim=1)
    base_N = first_code(amax_N, ladder)
    last_N = torch.searchsorted(ladder * REACH, amax_N) - 1
    span = int((torch.maximum(last_N, torch.full_like(last_N, LOW_CODES)) - base_N).clamp(min=0).max())
    best_N = base_N
    least_N = block_error(u_N16, h_N16, ladder[base_N])
    for k in range(1, span + 1):
        code_N = (base_N + k).clamp(max=E4M3_CODES)
        error_N = block_error(u_N16, h_N16, ladder[code_N])
        better = error_N < least_N
        best_N = torch.where(better, code_N, best_N)
        least_N = torch.where(better, error_N, least_N)
    for k in range(1, E4M3_CODES):
        code_N = (base_N - k).clamp(min=1)
        scale_N = ladder[code_N]
        alive = (base_N - k >= 1) & (amax_N > 0) & (_clipped(u_N16, h_N16, scale_N) <= least_N)
        if not bool(alive.any()):
            break
        error_N = block_error(u_N16, h_N16, scale_N)
        better = error_N <= least_N  # the smaller code wins a tie
        best_N = torch.where(better, code_N, best_N)
        least_N = torch.where(better, error_N, least_N)
    return torch.where(amax_N > 0, best_N, ZERO_BLOCK_CODE).to(torch.uint8)
