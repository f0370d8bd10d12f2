"""Factoring H and dividing by it."""

from __future__ import annotations

import pytest
import torch

from compressor.solvers import goal
from compressor.solvers.goal import Goal, Root, divide, divide_damped, factor, feedback
from compressor.solvers.statistics import Moments
from tests.numerics.quadratics import hessian, quadratic, weights


@pytest.mark.parametrize("size", [1, 63, 64, 200])
@pytest.mark.parametrize("panel", [2048, 64])
def test_factor(size: int, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """R is lower triangular and R^T R is H, to the precision of fp32; in one panel and in several."""
    monkeypatch.setattr(goal, "FACTORED", panel)
    h_BII = torch.stack([hessian(size, seed) for seed in (0, 1)])
    root_BII = h_BII.clone()
    assert factor(root_BII).all()
    assert torch.equal(root_BII, root_BII.tril())
    torch.testing.assert_close(
        (root_BII.double().mT @ root_BII.double()).float(), h_BII, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("column", [0, 5, 150])
@pytest.mark.parametrize("panel", [2048, 64])
def test_what_cannot_be_factored(column: int, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indefinite and non-finite matrices are told apart from good ones of the same batch."""
    monkeypatch.setattr(goal, "FACTORED", panel)
    bad_II = hessian(200)
    bad_II[column, column] = -0.5
    lost_II = hessian(200)
    lost_II[column, column] = float("nan")
    assert factor(torch.stack([bad_II, hessian(200), lost_II])).tolist() == [False, True, False]


def test_division() -> None:
    """b (R^T R)^-1, against fp64."""
    h_BII = torch.stack([hessian(70)] * 2)
    b_BOI = torch.stack([weights(24, 70, s) for s in (0, 1)])
    root_BII = h_BII.clone()
    factor(root_BII)
    x_BOI = divide(b_BOI, root_BII)
    torch.testing.assert_close(x_BOI.double() @ h_BII.double(), b_BOI.double(), rtol=1e-4, atol=1e-5)


def test_roots_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its own order, with the least damping that serves; the identity where none does."""
    monkeypatch.setattr(goal, "COPIED", 16)
    good_II, weak_II, bad_II = hessian(70), hessian(70, 1), hessian(70, 2)
    weak_II[3, 3] = -0.3
    bad_II[0, 1] = bad_II[1, 0] = -1e4
    h_BII = torch.stack([good_II, weak_II, bad_II])
    before = h_BII.clone()
    damping_B = torch.tensor([0.01, 0.1, 0.1], dtype=torch.float64)
    root = Root.of(h_BII, damping_B, ordered=True)
    assert torch.equal(h_BII, before)
    assert root.ok_B.tolist() == [True, True, False]
    assert root.added_B[:2].tolist() == pytest.approx([0.01, 1.0])
    assert root.order_BI is not None
    for b in (0, 1):
        order_I = root.order_BI[b]
        diagonal_I = h_BII[b].diagonal()[order_I]
        assert bool((diagonal_I.diff() <= 0).all())
        made_II = root.root_BII[b].double().T @ root.root_BII[b].double()
        wanted_II = h_BII[b].double() + root.added_B[b] * torch.eye(70)
        torch.testing.assert_close(made_II, wanted_II[order_I][:, order_I], rtol=1e-5, atol=1e-5)
        # the last column of the order pays in full; earlier ones only what later ones cannot make up for
        inverse_II = torch.linalg.inv(wanted_II[order_I[5:]][:, order_I[5:]])
        assert root.pivots_BI[b, order_I[5]] == pytest.approx(float(1 / inverse_II[0, 0]), rel=1e-4)
    assert torch.equal(root.root_BII[2], torch.eye(70))
    a_BII = feedback(root.root_BII.clone())
    assert torch.equal(a_BII, a_BII.tril(-1))
    diagonal_BI1 = root.root_BII.diagonal(dim1=1, dim2=2)[..., None]
    torch.testing.assert_close(a_BII, (root.root_BII / diagonal_BI1).tril(-1))


@pytest.mark.parametrize("both", [True, False])
def test_added_error(both: bool) -> None:
    """J of any values beyond J of the target, against J itself in fp64."""
    weight_OI, h_II, change_II = weights(24, 70), hessian(70), 0.1 * weights(70, 70, 4)
    found = Goal.of(weight_OI[None], [Moments(h_II, change_II if both else None, 1000)], torch.tensor([0.2]))
    rows = slice(3, 20)
    decoded_OI = weight_OI[rows] + 0.1 * weights(17, 70, 5)

    def j(values_OI: torch.Tensor) -> float:
        miss_OI = values_OI.double() - weight_OI[rows].double()
        pull_OI = weight_OI[rows].double() @ change_II.double()
        return quadratic(miss_OI, h_II) - 2.0 * float(both) * float((miss_OI * pull_OI).sum())

    target_OI = found.target_BOI[0, rows]
    assert (j(target_OI) < j(weight_OI[rows])) == both
    wanted = j(decoded_OI) - j(target_OI)
    assert found.added_error((0, rows), decoded_OI) == pytest.approx(wanted, rel=1e-4)
    assert found.energy((0, rows)) == pytest.approx(quadratic(weight_OI[rows], h_II), rel=1e-5)


def test_what_is_pulled_is_what_changes_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    """W D in place of D, in units of its own: the same target but for rounding; H is as it was."""
    monkeypatch.setattr(goal, "FACTORED", 32)
    monkeypatch.setattr(goal, "DIVIDED", 10)
    weight_OI, change_II = weights(24, 70), 0.1 * weights(70, 70, 4)
    h_II = hessian(70)
    before_II = h_II.clone()
    unit = 0.25
    wanted = Goal.of(unit * weight_OI[None], [Moments(h_II, change_II, 1000)], torch.tensor([0.2]), [unit])
    pulled = Moments(h_II, None, 1000, weight_OI @ change_II)
    found = Goal.of(unit * weight_OI[None], [pulled], torch.tensor([0.2]), [unit])
    torch.testing.assert_close(found.target_BOI, wanted.target_BOI, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found.target_BOI, found.weight_BOI)
    assert torch.equal(h_II, before_II)


def test_division_by_what_is_damped() -> None:
    """Each by the least damping that serves, in H's own memory; as it was where none does."""
    good_II, weak_II, bad_II = hessian(70), hessian(70, 1), hessian(70, 2)
    weak_II[3, 3] = -0.3
    bad_II[0, 1] = bad_II[1, 0] = -1e4
    h_BII = torch.stack([good_II, weak_II, bad_II])
    before_BII = h_BII.clone()
    b_BOI = torch.stack([weights(24, 70, seed) for seed in range(3)])
    x_BOI = b_BOI.clone()
    added_B, ok_B = divide_damped(x_BOI, h_BII, torch.tensor([0.01, 0.1, 0.1], dtype=torch.float64))
    assert torch.equal(h_BII, before_BII)
    assert ok_B.tolist() == [True, True, False]
    assert added_B[:2].tolist() == pytest.approx([0.01, 1.0])
    assert torch.equal(x_BOI[2], b_BOI[2])
    for b in (0, 1):
        damped_II = h_BII[b].double() + added_B[b] * torch.eye(70)
        wanted_OI = torch.linalg.solve(damped_II, b_BOI[b].double(), left=False)
        torch.testing.assert_close(x_BOI[b].double(), wanted_OI, rtol=1e-3, atol=1e-4)
