"""Problems for rounding under a quadratic error, and the paper's own algorithm, slowly.

Legend: O rows, I columns, N tokens.
"""

from __future__ import annotations

import torch

from compressor.numerics.grids import Grid


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """fp32 [N, I]: correlated, with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(columns, columns, generator=generator) / columns**0.5
    size_I = torch.exp(torch.randn(columns, generator=generator))
    noise_NI = torch.randn(tokens, columns, generator=generator)
    return (noise_NI @ mixing_II + 0.3 * torch.randn(tokens, columns, generator=generator)) * size_I


def hessian(columns: int, seed: int = 0) -> torch.Tensor:
    """fp32 [I, I]: a damped second moment over its mean diagonal, symmetric to the last bit."""
    x_NI = inputs(4 * columns, columns, seed)
    h_II = x_NI.T @ x_NI
    # some numbers of threads add in another order below the diagonal
    h_II = h_II.triu() + h_II.triu(1).T
    return h_II / h_II.diagonal().mean() + 0.01 * torch.eye(columns)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """fp32 [O, I]."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(100 + seed)) * 0.05


def quadratic(error_OI: torch.Tensor, h_II: torch.Tensor) -> float:
    """tr(E H E^T) in fp64."""
    return float((error_OI.double() @ h_II.double() * error_OI.double()).sum())


def upper_root(h_BII: torch.Tensor) -> torch.Tensor:
    """fp32 upper triangular M with H = M M^T, computed in fp64."""
    return torch.linalg.cholesky(h_BII.double().flip(1, 2)).float().flip(1, 2)


def optimal_brain_rounding(
    weight_OI: torch.Tensor,
    h_II: torch.Tensor,
    scale_OI: torch.Tensor,
    zero_OI: torch.Tensor,
    order: list[int],
    grid: Grid,
) -> torch.Tensor:
    """What arXiv:2210.17323 does, before its speed-ups (section 3.1, equations 2 and 3), in fp64.

    Column by column in the order given: round it; spread its error over the columns left by the inverse of H
    among them; take it out of that inverse.
    """
    left_OI = weight_OI.double().clone()
    inverse_II = torch.linalg.inv(h_II.double())
    chosen_OI = torch.zeros_like(left_OI)
    for j in order:
        scale_O, zero_O = scale_OI[:, j].double(), zero_OI[:, j].double()
        rounded_O = grid.round((left_OI[:, j] / scale_O + zero_O).float()).double()
        chosen_OI[:, j] = (rounded_O - zero_O) * scale_O
        error_O = (left_OI[:, j] - chosen_OI[:, j]) / inverse_II[j, j]
        left_OI -= error_O[:, None] * inverse_II[j]
        inverse_II -= torch.outer(inverse_II[:, j], inverse_II[j]) / inverse_II[j, j]
    return chosen_OI.float()
