"""The compiled sweeps against torch: equal but for near-ties, and the same bits in any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import compressor.kernels as kernels
from compressor.kernels import columns as compiled
from compressor.numerics import columns as eager
from compressor.numerics.grids import E2M1, E4M3, INT4, INT8, Grid
from tests.numerics.quadratics import hessian, quadratic, upper_root, weights

GRIDS = pytest.mark.parametrize("grid", [E2M1, E4M3, INT4, INT8], ids=["e2m1", "e4m3", "int4", "int8"])
# more than one tile of rows, and a part of one
ROWS, COLUMNS, WIDTH = 150, 96, 16


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Runs a test alone and split among threads, however small the work."""
    monkeypatch.setattr(kernels, "MIN_VALUES_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _problem(grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two matrices: targets [2, O, I], H [2, I, I], scales and zero points [2, O, C]."""
    target_BOI = torch.stack([weights(ROWS, COLUMNS, seed) for seed in (0, 1)])
    h_BII = torch.stack([hessian(COLUMNS, seed) for seed in (0, 1)])
    scale_BOC = target_BOI.view(2, ROWS, -1, WIDTH).abs().amax(-1) / min(grid.high, 60.0)
    zero_BOC = torch.full_like(scale_BOC, 2.0 if grid is INT4 else 0.0)
    return target_BOI, h_BII, scale_BOC, zero_BOC


def _lower(h_BII: torch.Tensor) -> torch.Tensor:
    m_BII = upper_root(h_BII)
    return (m_BII / m_BII.diagonal(dim1=1, dim2=2)[:, None]).mT.tril(-1).float().contiguous()


def _alike(first: torch.Tensor, second: torch.Tensor, target: torch.Tensor, h_BII: torch.Tensor) -> None:
    """Sums of fp32 in another order turn a value in thousands; the error stays what it was."""
    assert float((first != second).float().mean()) < 0.01
    for one, other, wanted, h_II in zip(first, second, target, h_BII, strict=True):
        assert quadratic(one - wanted, h_II) == pytest.approx(quadratic(other - wanted, h_II), rel=0.005)


@GRIDS
def test_sweeps(grid: Grid, threads: int) -> None:
    """First and later sweeps, with columns out of order."""
    target_BOI, h_BII, scale_BOC, zero_BOC = _problem(grid)
    group_BI = torch.stack(
        [torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    )
    scales = (scale_BOC, zero_BOC, group_BI // WIDTH, grid)
    first = compiled.sweep(target_BOI, None, _lower(h_BII), *scales)
    _alike(first, eager.sweep(target_BOI, None, _lower(h_BII), *scales), target_BOI, h_BII)
    a_BII = h_BII / h_BII.diagonal(dim1=1, dim2=2)[..., None]
    a_BII.diagonal(dim1=1, dim2=2).zero_()
    later = compiled.sweep(target_BOI, first, a_BII, *scales)
    _alike(later, eager.sweep(target_BOI, first, a_BII, *scales), target_BOI, h_BII)
    assert not torch.equal(first, later)


@GRIDS
def test_refits(grid: Grid, threads: int) -> None:
    """Values, and the candidates named."""
    target_BOI, h_BII, scale_BOC, zero_BOC = _problem(grid)
    group_BI = (torch.arange(COLUMNS) // WIDTH).expand(2, -1)
    start_BOI = compiled.sweep(target_BOI, None, _lower(h_BII), scale_BOC, zero_BOC, group_BI, grid)
    blocks_BCWW = torch.stack(
        [h_BII[:, i : i + WIDTH, i : i + WIDTH] for i in range(0, COLUMNS, WIDTH)], dim=1
    )
    m_NWW = upper_root(blocks_BCWW.flatten(0, 1))
    a_BCWW = (m_NWW / m_NWW.diagonal(dim1=1, dim2=2)[:, None]).mT.tril(-1).float().view_as(blocks_BCWW)
    d_BCW = m_NWW.diagonal(dim1=1, dim2=2).square().float().view(blocks_BCWW.shape[:3])
    inverse_BCWW = torch.linalg.inv(blocks_BCWW.double()).float()
    scale_BOCK = scale_BOC[..., None] * torch.tensor([1.0, 0.9, 1.1])
    zero_BOCK = zero_BOC[..., None].expand_as(scale_BOCK)
    arguments = (target_BOI, start_BOI, h_BII, inverse_BCWW, a_BCWW, d_BCW, scale_BOCK, zero_BOCK, grid)
    (ours, best), (theirs, expected) = compiled.refit(*arguments), eager.refit(*arguments)
    _alike(ours, theirs, target_BOI, h_BII)
    assert float((best != expected).float().mean()) < 0.01
    assert best.dtype == expected.dtype


@GRIDS
def test_same_bits_in_any_threads(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing depends on how rows are spread."""
    monkeypatch.setattr(kernels, "MIN_VALUES_PER_THREAD", 1)
    target_BOI, h_BII, scale_BOC, zero_BOC = _problem(grid)
    group_BI = (torch.arange(COLUMNS) // WIDTH).expand(2, -1)
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        values = compiled.sweep(target_BOI, None, _lower(h_BII), scale_BOC, zero_BOC, group_BI, grid)
        found.append(values)
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
