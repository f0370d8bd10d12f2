"""GPTQ with every scheme, against a library's own, and where it must step back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

from compressor.errors import CheckpointError
from compressor.kernels import columns
from compressor.schemes.base import Scheme
from compressor.schemes.int4 import Int4
from compressor.schemes.int8 import Int8
from compressor.schemes.nvfp4 import Nvfp4A16
from compressor.solvers.base import Solved
from compressor.solvers.gptq import Gptq
from compressor.solvers.rounding import SCARCE_CORRECTION_DAMPING, SCARCE_DAMPING, solve_batch
from compressor.solvers.rtn import Rtn
from compressor.solvers.statistics import Moments, MomentSums
from tests.numerics.quadratics import inputs, quadratic, weights
from tests.schemes.cases import LABELS, SCHEMES, applicable, matrices
from tests.schemes.test_golden import same_bytes

BARE = Gptq(damping=0.01, activation_order=False, passes=0)


def heard(x_NI: torch.Tensor, original_NI: torch.Tensor | None = None) -> Moments:
    """The moments of one batch."""
    sums = MomentSums(x_NI.shape[1], "cpu", original_NI is not None, longest=1e9)
    sums.add(x_NI, original_NI)
    return sums.result()


def decoded(scheme: Scheme, solved: Solved, like: torch.Tensor) -> torch.Tensor:
    """The stored matrix."""
    return scheme.decode(solved.tensors, *like.shape)


@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_every_scheme(scheme: Scheme) -> None:
    """Better than round-to-nearest at the output, on text of its kind too; errors are those measured."""
    weight, x_NI = matrices()["mixed bf16"], inputs(2048, 256)
    train_NI, test_NI = x_NI[:1536], x_NI[1536:]
    before = weight.clone()
    solved = Gptq().solve_heard([weight], scheme, heard(train_NI))[0]
    plain = Rtn().solve([weight], scheme)[0]
    assert torch.equal(weight, before)
    assert solved.used == "gptq"
    assert solved.tensors.keys() == plain.tensors.keys()
    for local, tensor in solved.tensors.items():
        assert (tensor.dtype, tensor.shape) == (plain.tensors[local].dtype, plain.tensors[local].shape)
    h_II = train_NI.T @ train_NI
    energy = quadratic(weight.float(), h_II)
    for each, error in ((solved, solved.output_error), (plain, solved.rtn_output_error)):
        miss_OI = decoded(scheme, each, weight) - weight.float()
        assert error == pytest.approx(quadratic(miss_OI, h_II) / energy, rel=1e-3)
    ours, theirs = (
        quadratic(decoded(scheme, each, weight) - weight.float(), test_NI.T @ test_NI)
        for each in (solved, plain)
    )
    assert ours < 0.9 * theirs


@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_every_kind_of_matrix(scheme: Scheme) -> None:
    """No matrix of any dtype or size makes a result that is not finite, or worse than round-to-nearest."""
    for name, weight in matrices().items():
        if not applicable(scheme, weight) or name == "largest":  # decodes to infinity where it rounds up
            continue
        solved = Gptq().solve_heard([weight], scheme, heard(inputs(600, weight.shape[1])))[0]
        assert decoded(scheme, solved, weight).isfinite().all(), name
        assert solved.output_error is not None
        assert solved.rtn_output_error is not None
        assert solved.output_error <= solved.rtn_output_error, name


@pytest.mark.parametrize("symmetric", [True, False])
def test_library_chooses_the_same_codes(symmetric: bool) -> None:
    """llm-compressor's GPTQ with our scales: but for near-ties in its fp32 inverse."""
    scheme = Int4(group_size=32, symmetric=symmetric)
    weight, x_NI = weights(96, 256), inputs(2048, 256)
    solved = BARE.solve_heard([weight], scheme, heard(x_NI))[0]
    ours_OI = decoded(scheme, solved, weight)
    args = scheme.ct_scheme([]).weights
    assert isinstance(args, QuantizationArgs)
    zero_OC = scheme._load_zero_point(solved.tensors, 96)
    h_II = x_NI.T @ x_NI / len(x_NI)
    theirs_BOI, _, fell_back_B = quantize_weight(
        weight[None].clone(),
        h_II[None].clone(),
        solved.tensors["weight_scale"].float()[None],
        torch.zeros(1, 96, 8) if zero_OC is None else zero_OC[None],
        None,
        args,
        percdamp=0.01 + SCARCE_DAMPING * 256 / len(x_NI),
    )
    assert not fell_back_B.any()
    same_OI = torch.isclose(ours_OI, theirs_BOI[0], rtol=1e-4, atol=1e-7)
    # none of 24,576 differed where this was written; one near-tie may change what follows in its row
    assert int((~same_OI).any(dim=1).sum()) <= 1


@pytest.mark.parametrize(
    "scheme", [Nvfp4A16(), Int4(group_size=64), Int8(group_size=64)], ids=lambda s: s.label
)
def test_each_step_pays(scheme: Scheme) -> None:
    """The order and each pass take off some of the error that is left."""
    weight, moments = weights(128, 256).bfloat16(), heard(inputs(2048, 256))
    steps = [BARE, *(Gptq(damping=0.01, passes=passes) for passes in (0, 1, 3))]
    errors = [step.solve_heard([weight], scheme, moments)[0].output_error or 0.0 for step in steps]
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_source_inputs_as_the_target() -> None:
    """With inputs that earlier layers have bent, weights fitted to them come nearer the source's output."""
    weight, original_NI = weights(128, 256).bfloat16(), inputs(4096, 256)
    bent_NI = original_NI @ (torch.eye(256) + 0.02 * weights(256, 256, seed=3) / 0.05) + 0.1 * inputs(
        4096, 256, 5
    )
    train, test = slice(0, 3072), slice(3072, None)
    wanted_NO = original_NI[test] @ weight.float().T

    def missed(moments: Moments) -> tuple[float, Solved]:
        solved = Gptq().solve_heard([weight], Nvfp4A16(), moments)[0]
        got_NO = bent_NI[test] @ decoded(Nvfp4A16(), solved, weight).T
        return float((got_NO - wanted_NO).square().sum() / wanted_NO.square().sum()), solved

    both, solved = missed(heard(bent_NI[train], original_NI[train]))
    alone, _ = missed(heard(bent_NI[train]))
    assert both < 0.8 * alone
    # what is reported: the error beyond that of the real weights that were rounded
    x_NI, y_NO = bent_NI[train].double(), original_NI[train].double() @ weight.double().T
    h_II = x_NI.T @ x_NI
    held = 0.2 + SCARCE_CORRECTION_DAMPING * 256 / len(x_NI)
    ridge_II = h_II + held * h_II.diagonal().mean() * torch.eye(256).double()
    pull_OI = weight.double() @ (original_NI[train].double().T @ x_NI - h_II)
    target_OI = weight.double() + torch.linalg.solve(ridge_II, pull_OI.T).T
    values = (decoded(Nvfp4A16(), solved, weight).double(), target_OI)
    ours, least = (float((x_NI @ w_OI.T - y_NO).square().sum()) for w_OI in values)
    energy = float((x_NI @ weight.double().T).square().sum())
    assert solved.output_error == pytest.approx((ours - least) / energy, abs=1e-5)
    assert 0 < solved.output_error < (solved.rtn_output_error or 0)


@pytest.mark.parametrize("tokens", [3, 30, 200])
def test_few_tokens_do_no_harm(tokens: int) -> None:
    """An expert that heard little: on other text no worse than round-to-nearest."""
    weight, x_NI = weights(128, 256).bfloat16(), inputs(4096, 256)
    bent_NI = x_NI + 0.2 * inputs(4096, 256, 5)
    plain_OI = decoded(Nvfp4A16(), Rtn().solve([weight], Nvfp4A16())[0], weight)
    wanted_NO = x_NI[2048:] @ weight.float().T
    for moments in (heard(bent_NI[:tokens]), heard(bent_NI[:tokens], x_NI[:tokens])):
        found_OI = decoded(Nvfp4A16(), Gptq().solve_heard([weight], Nvfp4A16(), moments)[0], weight)
        ours, theirs = (
            float((bent_NI[2048:] @ values_OI.T - wanted_NO).square().sum())
            for values_OI in (found_OI, plain_OI)
        )
        assert ours < 1.02 * theirs


def test_dead_and_unheard_inputs() -> None:
    """Columns that no token reaches keep their nearest values; nothing heard is plain round-to-nearest."""
    weight, x_NI = weights(64, 128).bfloat16(), inputs(1024, 128)
    x_NI[:, 16:48] = 0.0
    solved = Gptq().solve_heard([weight], Nvfp4A16(), heard(x_NI))[0]
    assert solved.used == "gptq"
    miss_OI = decoded(Nvfp4A16(), solved, weight) - weight.float()
    plain = Rtn().solve([weight], Nvfp4A16())[0]
    plain_miss_OI = decoded(Nvfp4A16(), plain, weight) - weight.float()
    assert miss_OI[:, 16:48].square().sum() <= 1.05 * plain_miss_OI[:, 16:48].square().sum()
    for moments, reason in (
        (heard(torch.zeros(8, 128)), "all zero"),
        (MomentSums(128, "cpu", False).result(), "no token"),
        (heard(torch.full((8, 128), float("nan"))), "not finite"),
    ):
        unheard = Gptq().solve_heard([weight], Nvfp4A16(), moments)[0]
        assert unheard.used == "rtn"
        assert reason in (unheard.note or "")
        assert unheard.output_error is None
        for local, tensor in plain.tensors.items():
            assert same_bytes(unheard.tensors[local], tensor)


def test_damping_ladder() -> None:
    """Few tokens leave H singular: damping makes it whole. What no damping makes positive is left to rtn."""
    weight = weights(64, 128).bfloat16()
    assert Gptq(damping=1e-6).solve_heard([weight], Nvfp4A16(), heard(inputs(20, 128)))[0].used == "gptq"
    bent_II = torch.eye(128)
    bent_II[0, 1] = bent_II[1, 0] = -1.5  # no second moment: least eigenvalue -0.5
    assert Gptq().solve_heard([weight], Nvfp4A16(), Moments(bent_II, None, 100_000))[0].used == "gptq"
    bent_II[0, 1] = bent_II[1, 0] = -50.0
    solved = Gptq().solve_heard([weight], Nvfp4A16(), Moments(bent_II, None, 100_000))[0]
    assert solved.used == "rtn"
    assert "singular" in (solved.note or "")


def test_a_fuse_group_shares_its_tensor_scale() -> None:
    """Matrices of one engine matrix get one tensor-level scale, whichever solver they end with."""
    parts = [weights(32, 128) * size for size in (0.1, 1.0, 4.0)]
    solved = Gptq().solve_heard(parts, Nvfp4A16(), heard(inputs(1024, 128)))
    assert len({each.tensors["weight_global_scale"].item() for each in solved}) == 1
    assert len({each.used for each in solved}) == 1


def test_groups_are_solved_as_if_alone() -> None:
    """Experts with inputs of their own."""
    groups = [
        ([weights(32, 128, seed), weights(48, 128, seed + 9)], heard(inputs(512, 128, seed)))
        for seed in range(3)
    ]
    groups.append(([weights(16, 64)], heard(inputs(512, 64))))
    for (matrices_OI, moments), solved in zip(groups, Gptq().solve_groups(groups, Nvfp4A16()), strict=True):
        alone = Gptq().solve_heard(matrices_OI, Nvfp4A16(), moments)
        for one, other in zip(solved, alone, strict=True):
            assert one.output_error == other.output_error
            assert all(same_bytes(one.tensors[local], tensor) for local, tensor in other.tensors.items())


def test_batches_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one shape at once, in torch as on an accelerator: as good as the compiled ones alone."""
    groups = [([weights(32, 128, seed)], heard(inputs(512, 128, seed))) for seed in range(3)]
    alone = Gptq().solve_groups(groups, Nvfp4A16())
    monkeypatch.setattr(columns, "compiled", lambda values: False)
    for (one,), (other,) in zip(alone, solve_batch(Gptq(), groups, Nvfp4A16()), strict=True):
        # sums in another order turn near-ties
        assert one.output_error == pytest.approx(other.output_error, rel=0.02)
        assert one.rtn_output_error == pytest.approx(other.rtn_output_error, rel=1e-4)


def test_same_bits_again() -> None:
    """The stored tensors and the errors reported are those of the last time."""
    weight, original_NI = weights(200, 256).bfloat16(), inputs(1024, 256)
    moments = heard(original_NI + 0.1 * inputs(1024, 256, 1), original_NI)
    solver, scheme = Gptq(), Int4(group_size=64, symmetric=False)
    once, again = (solver.solve_heard([weight], scheme, moments)[0] for _ in range(2))
    assert again.output_error == once.output_error
    assert all(same_bytes(again.tensors[local], tensor) for local, tensor in once.tensors.items())


def test_non_finite_weights() -> None:
    """As round-to-nearest reports them."""
    weight = weights(64, 64)
    weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match="1 non-finite value"):
        Gptq().solve_heard([weight], Nvfp4A16(), heard(inputs(100, 64)))
