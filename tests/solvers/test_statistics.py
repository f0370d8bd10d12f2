"""Moments: exact sums, and massive activations that do not drown the rest."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics.row_weights import row_norms, row_weights
from compressor.schemes.nvfp4 import Nvfp4A16
from compressor.solvers.gptq import Gptq
from compressor.solvers.statistics import CHUNK_ROWS, MomentSums, Routed, add_together
from tests.numerics.quadratics import inputs, quadratic, weights


def test_sums_are_those_of_fp64() -> None:
    """Over batches, more rows than a chunk and none; relative to the diagonal, fp32's own precision."""
    fed_NI, noise_NI = inputs(2 * CHUNK_ROWS + 77, 48), inputs(2 * CHUNK_ROWS + 77, 48, seed=1)
    original_NI = fed_NI + 0.1 * noise_NI
    sums = MomentSums(48, "cpu", True, longest=1e9)
    for rows in (slice(0, 5000), slice(5000, 5000), slice(5000, None)):
        sums.add(fed_NI[rows], original_NI[rows])
    moments = sums.result()
    assert moments.rows == len(fed_NI)
    assert moments.change_II is not None
    for found, left in ((moments.second_II, fed_NI), (moments.change_II, original_NI - fed_NI)):
        exact = left.double().T @ fed_NI.double()
        size = torch.outer(left.double().norm(dim=0), fed_NI.double().norm(dim=0))
        assert float(((found - exact).abs() / size).max()) < 2e-6


def test_bf16_inputs() -> None:
    """Sums are fp32; each of their parts is rounded to bf16, relative to the sums of absolute products."""
    fed_NI = inputs(500, 16).bfloat16()
    sums = MomentSums(16, "cpu", False, longest=1e9)
    sums.add(fed_NI)
    moments = sums.result()
    assert moments.change_II is None
    assert moments.second_II.dtype == torch.float32
    assert torch.equal(moments.second_II, moments.second_II.T)
    exact = fed_NI.double().T @ fed_NI.double()
    assert float(((moments.second_II - exact).abs() / exact.abs()).max()) < 2**-8


def test_weights_of_rows() -> None:
    """A long row counts as if it were 8 times the median; ordinary ones count fully; zeros are no fault."""
    x_NI = torch.ones(5, 4)
    x_NI[3] *= 1000.0
    x_NI[4] = 0.0
    assert row_weights(x_NI, 8.0).tolist() == pytest.approx([1.0, 1.0, 1.0, (8 / 1000) ** 2, 1.0])
    assert row_weights(torch.zeros(3, 4), 8.0).tolist() == [1.0, 1.0, 1.0]
    x_NI[:3] = 0.0
    x_NI[4, 0] = 1.0
    assert row_weights(x_NI, 8.0).tolist() == [1.0] * 5


def test_a_massive_activation_does_not_hurt_the_others() -> None:
    """One token in 512 with 1000 times the norm, as the first of each sequence has in some layers.

    With all rows alike, its direction is nearly all of H and the weights are bent out of shape for it.
    """
    weight_OI, scheme = weights(64, 256).bfloat16(), Nvfp4A16()
    x_NI, fresh_NI = inputs(4096, 256), inputs(4096, 256)[2048:]
    clean_NI = x_NI[:2048].clone()
    spoilt_NI = clean_NI.clone()
    direction_I = torch.zeros(256)
    direction_I[[7, 130]] = torch.tensor([0.8, -0.6])
    spoilt_NI[::512] = direction_I * 1000 * clean_NI.norm(dim=1).median() + clean_NI[::512]

    def solve(rows_NI: torch.Tensor, longest: float) -> tuple[float, float, float]:
        sums = MomentSums(256, "cpu", False, longest=longest)
        for start in range(0, 2048, 1024):
            sums.add(rows_NI[start : start + 1024])
        solved = Gptq().solve_heard([weight_OI], scheme, sums.result())[0]
        miss_OI = scheme.decode(solved.tensors, 64, 256) - weight_OI.float()
        group_N = (
            miss_OI.view(-1, 16).square().sum(1) / weight_OI.float().view(-1, 16).square().sum(1)
        ).sqrt()
        massive = float((miss_OI @ direction_I).norm() / (weight_OI.float() @ direction_I).norm())
        return quadratic(miss_OI, fresh_NI.T @ fresh_NI), float(group_N.max()), massive

    best, best_group, _ = solve(clean_NI, 1e9)
    robust, robust_group, robust_massive = solve(spoilt_NI, 8.0)
    plain, plain_group, _ = solve(spoilt_NI, 1e9)
    # 5 percent: the massive token still counts as 64 ordinary ones
    assert robust < 1.05 * best
    assert plain > 1.2 * robust
    # groups that hold the massive channels keep their other values
    assert robust_group < 1.2 * best_group
    assert plain_group > 1.2 * best_group
    assert robust_massive < 0.03


@pytest.mark.parametrize("rows", [20, 47])
def test_changes_of_outputs(rows: int) -> None:
    """Of matrices with fewer rows than columns W D is summed, without D: the same to fp32's precision."""
    fed_NI, noise_NI = inputs(3000, 48), inputs(3000, 48, seed=1)
    fed_NI[::700] *= 1000.0
    weight_OI = weights(rows, 48)
    both = [MomentSums(48, "cpu", True), MomentSums(48, "cpu", True, weight_OI=weight_OI)]
    for sums in both:
        for chosen in (slice(0, 1000), slice(1000, None)):
            sums.add(fed_NI[chosen], fed_NI[chosen] + 0.1 * noise_NI[chosen])
    plain, pulled = (sums.result() for sums in both)
    assert torch.equal(plain.second_II, pulled.second_II)
    assert plain.change_II is not None
    assert pulled.pull_OI is not None
    assert plain.pull_OI is None
    assert pulled.change_II is None
    wanted_OI = weight_OI.double() @ plain.change_II.double()
    size_OI = weight_OI.double().abs() @ plain.change_II.double().abs()
    assert float(((pulled.pull_OI - wanted_OI).abs() / size_OI).max()) < 1e-5
    some = pulled.of_rows(slice(3, 9))
    assert some.pull_OI is not None
    assert torch.equal(some.pull_OI, pulled.pull_OI[3:9])
    assert MomentSums(48, "cpu", True, weight_OI=weights(48, 48)).result().pull_OI is None


def _routed(sums: MomentSums | None, x_NI: torch.Tensor) -> Routed:
    return Routed(sums, row_norms(x_NI), x_NI)


def test_rows_of_several_matrices() -> None:
    """As rows added one matrix at a time, but what is long is told by the median of all."""
    x_NI = inputs(900, 16)
    parts = torch.split(x_NI, [400, 0, 497, 3])
    together = [MomentSums(16, "cpu", False) for _ in parts]
    add_together([_routed(sums, part) for sums, part in zip(together, parts, strict=True)])
    add_together([])
    for sums, part in zip(together, parts, strict=True):
        alone = MomentSums(16, "cpu", False, longest=1e9)
        alone.add(part)
        assert sums.result().rows == len(part)
        assert torch.equal(sums.result().second_II, alone.result().second_II)
    x_NI[897:] *= 100.0  # the last matrix has only long rows
    long = MomentSums(16, "cpu", False)
    add_together([_routed(None, x_NI[:897]), _routed(long, x_NI[897:])])
    norm_N = x_NI.norm(dim=1)
    weight = float(long.result().second_II.trace()) / float(norm_N[897:].square().sum())
    longest = 8.0 * float(norm_N.median()) / float(norm_N[897:].max())
    # roots are powers of two, at most half too small
    assert longest**2 / 4 <= weight <= (8.0 * float(norm_N.median()) / float(norm_N[897:].min())) ** 2
