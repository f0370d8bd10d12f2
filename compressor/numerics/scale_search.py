"""The best of given scales (and zero points) for each group, in torch; ``compressor.kernels`` has the twin.

For a group of values w, importance h > 0, candidates (s, z) and rounding R to the format's grid:

    E(s, z) = sum_i h_i (w_i - s (R(w_i / s + z) - z))^2

in fp32, every operation rounded to nearest, the sum taken as a tree: with n terms left, the last floor(n/2)
are added to the first ones, until one is left. The first candidate with the least error wins. A fixed order
makes every implementation choose the same candidates.

Legend: N groups of G values, K candidates of each group, C groups in one row of the matrix.
"""

from __future__ import annotations

import torch

from compressor.numerics.grids import Grid


def tree_sum(terms_NG: torch.Tensor) -> torch.Tensor:
    """[N]: the sum along the last dimension in the order described above; overwrites its argument."""
    length = terms_NG.shape[1]
    while length > 1:
        half = length - length // 2
        terms_NG[:, : length // 2] += terms_NG[:, half:length]
        length = half
    return terms_NG[:, 0]


def group_error(
    w_NG: torch.Tensor, h_NG: torch.Tensor, scale_N: torch.Tensor, zero_N: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """fp32 [N]: E of one candidate a group."""
    scale_N1, zero_N1 = scale_N[:, None], zero_N[:, None]
    miss_NG = w_NG - scale_N1 * (grid.round(w_NG / scale_N1 + zero_N1) - zero_N1)
    return tree_sum(h_NG * (miss_NG * miss_NG))


def best_candidate(
    w_NG: torch.Tensor, h_CG: torch.Tensor, scale_NK: torch.Tensor, zero_NK: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """int64 [N]: the first candidate with the least error.

    Args:
        w_NG: fp32, finite, of a magnitude whose squares neither overflow nor vanish.
        h_CG: importance of the values of one row of groups; group n has ``h_CG[n % C]``.
        scale_NK: fp32, positive, as the decoder will read them.
        zero_NK: fp32 integers; zeros for symmetric formats.
        grid: the format's.
    """
    h_NG = h_CG.repeat(w_NG.shape[0] // h_CG.shape[0], 1)
    best_N = torch.zeros(w_NG.shape[0], dtype=torch.int64, device=w_NG.device)
    least_N = group_error(w_NG, h_NG, scale_NK[:, 0], zero_NK[:, 0], grid)
    for k in range(1, scale_NK.shape[1]):
        error_N = group_error(w_NG, h_NG, scale_NK[:, k], zero_NK[:, k], grid)
        better_N = error_N < least_N
        best_N = torch.where(better_N, k, best_N)
        least_N = torch.where(better_N, error_N, least_N)
    return best_N
