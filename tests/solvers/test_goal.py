"""Factoring H and dividing by it."""

from __future__ import annotations

import pytest
import torch

from compressor.solvers.goal import divide, factor
from tests.numerics.quadratics import hessian, weights


@pytest.mark.parametrize("size", [1, 63, 64, 200])
def test_factor(size: int) -> None:
    """M is upper triangular and M M^T is H, to the precision of fp32."""
    h_BII = torch.stack([hessian(size, seed) for seed in (0, 1)])
    m_BII, ok_B = factor(h_BII)
    assert ok_B.all()
    assert torch.equal(m_BII, m_BII.triu())
    torch.testing.assert_close((m_BII.double() @ m_BII.double().mT).float(), h_BII, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("column", [0, 5, 150])
def test_what_cannot_be_factored(column: int) -> None:
    """Indefinite and non-finite matrices are told apart from good ones of the same batch."""
    bad_II = hessian(200)
    bad_II[column, column] = -0.5
    lost_II = hessian(200)
    lost_II[column, column] = float("nan")
    _, ok_B = factor(torch.stack([bad_II, hessian(200), lost_II]))
    assert ok_B.tolist() == [False, True, False]


def test_division() -> None:
    """b (M M^T)^-1, against fp64."""
    h_BII = torch.stack([hessian(70)] * 2)
    b_BOI = torch.stack([weights(24, 70, s) for s in (0, 1)])
    x_BOI = divide(b_BOI, factor(h_BII)[0])
    torch.testing.assert_close(x_BOI.double() @ h_BII.double(), b_BOI.double(), rtol=1e-4, atol=1e-5)
