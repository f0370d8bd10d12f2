"""Sweeps and refits against slow, obvious versions."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from compressor.numerics import columns
from compressor.numerics.grids import E2M1, E4M3, INT4, INT8, Grid
from tests.numerics.quadratics import hessian, optimal_brain_rounding, quadratic, weights

GRIDS = pytest.mark.parametrize("grid", [E2M1, E4M3, INT4, INT8], ids=["e2m1", "e4m3", "int4", "int8"])
WIDTH = 16


def upper_factor(h_II: torch.Tensor) -> torch.Tensor:
    """fp64 upper triangular M with H = M M^T."""
    return torch.linalg.cholesky(h_II.double().flip(0, 1)).flip(0, 1)


def feedback(m_II: torch.Tensor) -> torch.Tensor:
    """fp32 A[j, k] = M[k, j] / M[j, j], k < j."""
    return (m_II / m_II.diagonal()).T.tril(-1).float()


def scales(weight_OI: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Min-max scales and some zero points [O, C]."""
    largest_OC = weight_OI.view(len(weight_OI), -1, WIDTH).abs().amax(-1)
    zero_OC = torch.zeros_like(largest_OC)
    if grid is INT4:
        zero_OC[:, ::2] = 2.0
    return largest_OC / min(grid.high, 60.0), zero_OC


def groups(count: int, order: torch.Tensor) -> torch.Tensor:
    """int64 [1, I]: the group of each column in the sweep's order."""
    return (order // WIDTH)[None]


@GRIDS
@pytest.mark.parametrize("ordered", [False, True])
def test_first_sweep_is_gptq(grid: Grid, ordered: bool) -> None:
    """The feedback form gives the paper's values; fp32 sums may turn a value that is nearly a tie."""
    weight_OI, h_II = weights(24, 160), hessian(160)
    scale_OC, zero_OC = scales(weight_OI, grid)
    order = torch.arange(160)
    if ordered:
        order = h_II.diagonal().argsort(descending=True, stable=True)
    a_II = feedback(upper_factor(h_II[order][:, order]))
    found = columns.sweep(
        weight_OI[None, :, order], None, a_II[None], scale_OC[None], zero_OC[None], groups(160, order), grid
    )[0]
    chosen_OI = torch.empty_like(found)
    chosen_OI[:, order] = found
    each = (x.repeat_interleave(WIDTH, 1) for x in (scale_OC, zero_OC))
    expected_OI = optimal_brain_rounding(weight_OI, h_II, *each, order.tolist(), grid)
    same_O = torch.isclose(chosen_OI, expected_OI, rtol=1e-5, atol=0).all(dim=1)
    # a near-tie changes what follows in its row: 24 rows of 160 values had none or one
    assert int((~same_O).sum()) <= 2
    assert quadratic(chosen_OI - weight_OI, h_II) == pytest.approx(
        quadratic(expected_OI - weight_OI, h_II), rel=0.02
    )


@GRIDS
def test_later_sweeps_descend(grid: Grid) -> None:
    """Each column takes the best value given all others, so the error falls and ends at a fixed point."""
    weight_OI, h_II = weights(8, 96), hessian(96)
    scale_OC, zero_OC = scales(weight_OI, grid)
    a_II = h_II / h_II.diagonal()[:, None]
    a_II.fill_diagonal_(0.0)
    order = torch.arange(96)
    arguments = (a_II[None], scale_OC[None], zero_OC[None], groups(96, order), grid)
    start_OI = columns.sweep(weight_OI[None], None, torch.zeros(1, 96, 96), *arguments[1:])
    errors = [quadratic(start_OI[0] - weight_OI, h_II)]
    chosen_BOI = start_OI
    for _ in range(30):
        chosen_BOI = columns.sweep(weight_OI[None], chosen_BOI, *arguments)
        errors.append(quadratic(chosen_BOI[0] - weight_OI, h_II))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    # no single code can do better: tried one by one
    scale_O, zero_O, j = scale_OC[:, 3], zero_OC[:, 3], 3 * WIDTH + 5
    for step in (-1.0, 1.0):
        moved_OI = chosen_BOI[0].clone()
        code_O = grid.round(moved_OI[:, j] / scale_O + zero_O)
        nudged_O = grid.round(torch.where(code_O == 0, step * 0.6, code_O * (1 + step * 0.26)))
        moved_OI[:, j] = (nudged_O - zero_O) * scale_O
        for row in range(8):
            moved = quadratic(moved_OI[row : row + 1] - weight_OI[row : row + 1], h_II)
            stayed = quadratic(chosen_BOI[0, row : row + 1] - weight_OI[row : row + 1], h_II)
            assert moved >= stayed * (1 - 1e-5)


def _blocks(h_II: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parts = [h_II[i : i + WIDTH, i : i + WIDTH] for i in range(0, len(h_II), WIDTH)]
    factors = [upper_factor(part) for part in parts]
    inverse = torch.stack([torch.linalg.inv(part.double()).float() for part in parts])
    pivots = torch.stack([m.diagonal().square().float() for m in factors])
    return inverse[None], torch.stack([feedback(m) for m in factors])[None], pivots[None]


@GRIDS
def test_refit(grid: Grid) -> None:
    """The error never grows; what is chosen lies on the lattice of the scale that is named."""
    weight_OI, h_II = weights(12, 96), hessian(96)
    scale_OC, zero_OC = scales(weight_OI, grid)
    ratios_K = torch.tensor([1.0, 0.8, 0.9, 1.1])
    scale_OCK = scale_OC[..., None] * ratios_K
    zero_OCK = zero_OC[..., None].expand_as(scale_OCK)
    scale_OI, zero_OI = (x.repeat_interleave(WIDTH, 1) for x in (scale_OC, zero_OC))
    start_OI = (grid.round(weight_OI / scale_OI + zero_OI) - zero_OI) * scale_OI
    chosen_BOI, best_BOC = columns.refit(
        weight_OI[None], start_OI[None], h_II[None], *_blocks(h_II), scale_OCK[None], zero_OCK[None], grid
    )
    assert quadratic(chosen_BOI[0] - weight_OI, h_II) < 0.95 * quadratic(start_OI - weight_OI, h_II)
    assert best_BOC.unique().tolist() == [0, 1, 2, 3]
    taken_OI = scale_OCK.gather(2, best_BOC[0, ..., None])[..., 0].repeat_interleave(WIDTH, 1)
    codes_OI = chosen_BOI[0] / taken_OI + zero_OI
    torch.testing.assert_close(grid.round(codes_OI), codes_OI, rtol=1e-5, atol=1e-5)


def test_refit_finds_what_enumeration_finds() -> None:
    """A group of two: rounding in turn is within reach of the best of all pairs, and never beats it."""
    h_II = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    weight_OI = torch.rand(60, 2, generator=torch.Generator().manual_seed(1)) * 4 - 2
    scale_OCK = torch.tensor([0.5, 0.4, 0.6]).expand(60, 1, 3)
    m_II = upper_factor(h_II)
    blocks = (
        torch.linalg.inv(h_II)[None, None],
        feedback(m_II)[None, None],
        m_II.diagonal().square().float(),
    )
    start_OI = (weight_OI / 0.5).round() * 0.5
    chosen_BOI, _ = columns.refit(
        weight_OI[None],
        start_OI[None],
        h_II[None],
        blocks[0],
        blocks[1],
        blocks[2][None, None],
        scale_OCK[None],
        torch.zeros(1, 60, 1, 3),
        INT4,
    )
    optimal = 0
    for row in range(60):
        weight_1I = weight_OI[row : row + 1]
        best = min(
            quadratic(torch.tensor([[first * scale, last * scale]]) - weight_1I, h_II)
            for scale in (0.5, 0.4, 0.6)
            for first, last in product(range(-8, 8), repeat=2)
        )
        found = quadratic(chosen_BOI[0, row : row + 1] - weight_1I, h_II)
        assert found >= best * (1 - 1e-4)
        optimal += found <= best * (1 + 1e-4)
    assert optimal >= 45
