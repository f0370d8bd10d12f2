"""Hadamard matrices of Sylvester's construction, and random orthogonal matrices.

Legend: N rows, D a power of two.
"""

from __future__ import annotations

from functools import lru_cache

import torch


def is_power_of_two(number: int) -> bool:
    """Whether a Sylvester matrix of this size exists."""
    return number > 0 and number & (number - 1) == 0


def sylvester(size: int) -> torch.Tensor:
    """fp32 [size, size] of +-1: H(1) = [1], H(2n) = [[H, H], [H, -H]]; symmetric, H @ H = size * I."""
    assert is_power_of_two(size), "Sylvester's matrices have sizes that are powers of two"
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        upper = torch.cat((matrix, matrix), dim=1)
        matrix = torch.cat((upper, torch.cat((matrix, -matrix), dim=1)))
    return matrix


def fast_hadamard(x: torch.Tensor) -> torch.Tensor:
    """``x @ sylvester(D)`` along the last dimension by butterflies, not normalized, in x's dtype.

    Each row is computed by itself in a fixed order, that of ``vllm@0.32 v1/attention/ops/
    int4_per_token_head.py`` on the CPU, so that bits depend neither on the number of rows nor on a BLAS.
    """
    size = x.shape[-1]
    assert is_power_of_two(size), "the fast transform needs a power of two"
    step = 1
    while step < size:
        pairs = torch.unflatten(x, -1, (size // (2 * step), 2, step))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        out = torch.empty_like(pairs, memory_format=torch.contiguous_format)
        torch.add(first, second, out=out[..., 0, :])
        torch.sub(first, second, out=out[..., 1, :])
        x = out.flatten(-3)
        step *= 2
    return x


@lru_cache(maxsize=64)
def random_orthogonal(size: int, seed: int) -> torch.Tensor:
    """fp64 [size, size] on the CPU, uniform over all orthogonal matrices: QR of a Gaussian one, signs mended.

    Source: Mezzadri, "How to generate random matrices from the classical compact groups", section 5. Shared
    between calls: must not be written to.
    """
    q, r = torch.linalg.qr(gaussian_matrix(size, seed))
    mended: torch.Tensor = q * r.diagonal().sign()
    return mended


def gaussian_matrix(size: int, seed: int) -> torch.Tensor:
    """fp64 [size, size] of independent N(0, 1), on the CPU, from the seed alone."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
