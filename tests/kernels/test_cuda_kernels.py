"""The Triton twins against torch, on an NVIDIA GPU or in Triton's interpreter on the CPU.

Searches and codes are equal bit for bit. Sweeps add in another order: a value that is almost half-way between
two of the lattice may go either way, and what follows in its row with it, so the errors are compared.

The interpreter must be chosen when triton is imported, hence the imports inside a function.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

from compressor.device import pick_device
from compressor.numerics import columns as eager
from compressor.numerics import nvfp4_search, scale_search
from compressor.numerics.grids import E2M1, E4M3, INT4, INT8, Grid
from compressor.schemes import inputs, parse_scheme
from compressor.schemes.base import Scheme
from tests.numerics.blocks import hard_blocks, importances
from tests.numerics.quadratics import hessian, quadratic, upper_root, weights
from tests.schemes.cases import hard_inputs, some_range, wild_inputs

DEVICE = pick_device()

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]
GRIDS = pytest.mark.parametrize("grid", [E2M1, E4M3, INT4, INT8], ids=["e2m1", "e4m3", "int4", "int8"])


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in Triton's interpreter where there is no GPU."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def _module(name: str) -> ModuleType:
    return import_module(f"compressor.kernels.{name}_cuda")


def _on(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def _weights(groups: int, size: int) -> torch.Tensor:
    """Normal values with a few extremes, zeros of both signs, ties and subnormal quotients."""
    w = torch.randn(groups, size, generator=torch.Generator().manual_seed(groups))
    w[0] = 0.0
    w[1] = -0.0
    w[2, :4] = torch.tensor([1e-30, -1e-30, 50.0, -50.0])
    w[3] = torch.arange(size) / 4 - 2
    return w


@pytest.mark.parametrize("name", hard_blocks())
@pytest.mark.parametrize("weighted", [False, True])
def test_nvfp4_search(name: str, weighted: bool) -> None:
    """Same codes as the torch search, signs and odd numbers of blocks included."""
    blocks, importance = _on(hard_blocks()[name][:67], importances() if weighted else torch.ones(1, 16))
    ours = _module("nvfp4_search").search_codes(-blocks, importance)
    assert torch.equal(ours, nvfp4_search.search_codes(-blocks, importance))


def test_nvfp4_importance_repeats_by_row() -> None:
    """Block n has the importance of column block n mod C."""
    importance = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) + 1e-3
    blocks, importance = _on(hard_blocks()["normal"][:99], importance)
    ours = _module("nvfp4_search").search_codes(blocks, importance)
    assert torch.equal(ours, nvfp4_search.search_codes(blocks, importance))


@GRIDS
@pytest.mark.parametrize("size", [5, 16, 32, 128, 577])
def test_best_candidate(grid: Grid, size: int) -> None:
    """Same candidates as the torch search, for groups of any length; the first of equal ones."""
    generator = torch.Generator().manual_seed(1)
    scale = (torch.rand(30, 7, generator=generator) + 0.3) * 3 / grid.high
    scale[:, 4:] = scale[:, :3]
    zero = torch.randint(-4, 5, (30, 7), generator=generator).float() * (grid.kind == "int")
    zero[:, 4:] = zero[:, :3]
    importance = torch.rand(3, size, generator=generator) + 0.1
    arguments = _on(_weights(30, size), importance, scale, zero)
    ours = _module("scale_search").best_candidate(*arguments, grid)
    expected = scale_search.best_candidate(*arguments, grid)
    assert ours.dtype == expected.dtype
    assert torch.equal(ours, expected)


def test_one_value_a_group() -> None:
    """The tree of one term has no level."""
    arguments = _on(torch.tensor([[1.0]]), torch.ones(1, 1), torch.tensor([[0.3, 0.5]]), torch.zeros(1, 2))
    assert _module("scale_search").best_candidate(*arguments, E2M1).tolist() == [1]


@pytest.mark.parametrize("length", [1, 2, 3, 12, 96, 577])
def test_tree_order(length: int) -> None:
    """Sums of halves of the padded terms are the tree: powers of two show which were added when."""
    order = torch.tensor(_module("scale_search").tree_order(length))
    assert sorted(order[order >= 0].tolist()) == list(range(length))
    terms = torch.rand(1, length, generator=torch.Generator().manual_seed(length))
    padded = torch.where(order >= 0, terms[:, order.clamp(min=0)], 0.0)
    while padded.shape[1] > 1:
        half = padded.shape[1] // 2
        padded = padded[:, :half] + padded[:, half:]
    assert torch.equal(padded[:, 0], scale_search.tree_sum(terms))


@GRIDS
@pytest.mark.parametrize("neutral", [0.0, -0.0])
@pytest.mark.parametrize("size", [16, 45])
def test_encode_and_decode(grid: Grid, neutral: float, size: int) -> None:
    """Same codes (signs of zeros included) and the same decoded weights."""
    twins = _module("grid_codes")
    w, scale, zero = _on(_weights(30, size), torch.linspace(0.01, 2.0, 30), torch.full((30,), neutral))
    codes, expected = twins.encode(w, scale, zero, grid), grid.encode(w, scale, zero)
    assert codes.dtype == expected.dtype
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(twins.decode(codes, scale, zero, grid), grid.decode(codes, scale, zero))


def test_integers_use_zero_points() -> None:
    """Zero points shift codes by whole steps, with saturation."""
    twins = _module("grid_codes")
    w, scale, zero = _on(_weights(30, 32), torch.full((30,), 0.2), torch.arange(30).float() % 16 - 8)
    codes = twins.encode(w, scale, zero, INT4)
    assert torch.equal(codes, INT4.encode(w, scale, zero))
    assert torch.equal(twins.decode(codes, scale, zero, INT4), INT4.decode(codes, scale, zero))


def test_every_e4m3_code_comes_back() -> None:
    """Encoding the value of each finite code gives the code, subnormals and both zeros included."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    values, one, neutral = _on(finite.float()[None], torch.ones(1), -torch.zeros(1))
    back = _module("grid_codes").encode(values, one, neutral, E4M3).cpu()
    assert torch.equal(back.view(torch.uint8)[0], finite.view(torch.uint8))


def _rounded_both(
    scheme: Scheme, x_NI: torch.Tensor, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the kernel and by torch, in fp32."""
    args = scheme.ct_scheme([]).input_activations
    assert args is not None
    assert inputs._has_twin(args, args.group_size or x_NI.shape[1])
    found = []
    for twin in (_module("input_rounding").round_groups, None):
        monkeypatch.setattr(inputs, "twin_for", lambda _, twin=twin: twin)
        rounded_NI = scheme.round_inputs(x_NI, tensors)
        assert rounded_NI.dtype == x_NI.dtype
        found.append(rounded_NI.float())
    return found[0], found[1]


# numpy, which the interpreter computes with, tells of infinity over infinity
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", ["nvfp4", "fp8_dynamic", "fp8_block", "fp8_static", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_input_rounding(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, signs of zeros and what is not finite included."""
    if dtype == torch.bfloat16 and DEVICE.type == "cpu" and kind != "nvfp4":
        pytest.skip("Triton's interpreter cuts values to bfloat16 instead of rounding them")
    scheme = parse_scheme({"kind": "int8", "activations": "dynamic"} if kind == "int8" else kind)
    tensors = scheme.input_tensors(some_range(hard_inputs()))
    (x_NI,) = _on(wild_inputs().to(dtype))
    for some_NI in (x_NI, x_NI[:, :128], x_NI[:1], x_NI[:0]):
        ours, expected = _rounded_both(scheme, some_NI, tensors, monkeypatch)
        same = ours.view(torch.int32) == expected.view(torch.int32)
        assert (same | (ours.isnan() & expected.isnan())).all()


def test_input_rounding_of_odd_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any length with a scale each, 16-bit ties included."""
    for width in (1, 5, 577, 1100):
        (x_NI,) = _on(torch.randn(7, width, generator=torch.Generator().manual_seed(width)).half())
        ours, expected = _rounded_both(parse_scheme("fp8_dynamic"), x_NI, {}, monkeypatch)
        assert torch.equal(ours, expected)


class _Problem:
    """Two matrices to round under two H, with scales and zero points of groups."""

    def __init__(self, grid: Grid, rows: int, columns: int, width: int) -> None:
        self.grid, self.width = grid, width
        target_BOI = torch.stack([weights(rows, columns, seed) for seed in (0, 1)])
        target_BOI[0, :, 1] = 0.0  # ties of candidates
        self.h_BII = torch.stack([hessian(columns, seed) for seed in (0, 1)]).to(DEVICE)
        scale_BOC = target_BOI.view(2, rows, -1, width).abs().amax(-1) / min(grid.high, 60.0)
        zero_BOC = torch.full_like(scale_BOC, 2.0 if grid is INT4 else 0.0)
        self.target_BOI, self.scale_BOC, self.zero_BOC = _on(target_BOI, scale_BOC, zero_BOC)

    def orders(self) -> torch.Tensor:
        """Groups of columns that come out of order, another order for each matrix."""
        columns = self.h_BII.shape[1]
        shuffled = [torch.randperm(columns, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
        return (torch.stack(shuffled) // self.width).to(DEVICE)

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inverse, feedback and pivots of the groups' diagonal blocks of H."""
        columns, width = self.h_BII.shape[1], self.width
        blocks_BCWW = torch.stack(
            [self.h_BII[:, i : i + width, i : i + width] for i in range(0, columns, width)], dim=1
        )
        m_NWW = upper_root(blocks_BCWW.flatten(0, 1))
        d_BCW = m_NWW.diagonal(dim1=1, dim2=2).square().float().view(blocks_BCWW.shape[:3])
        inverse_BCWW = torch.linalg.inv(blocks_BCWW.double()).float()
        return inverse_BCWW, _feedback(m_NWW).view_as(blocks_BCWW), d_BCW

    def alike(self, first_BOI: torch.Tensor, second_BOI: torch.Tensor) -> None:
        """Sums of fp32 in another order turn a value in thousands; the error stays what it was."""
        assert float((first_BOI != second_BOI).float().mean()) < 0.01
        for one, other, wanted, h_II in zip(first_BOI, second_BOI, self.target_BOI, self.h_BII, strict=True):
            error = quadratic(other - wanted, h_II)
            assert quadratic(one - wanted, h_II) == pytest.approx(error, rel=0.005)


def _feedback(m_NWW: torch.Tensor) -> torch.Tensor:
    return (m_NWW / m_NWW.diagonal(dim1=1, dim2=2)[:, None]).mT.tril(-1).float().contiguous()


@GRIDS
@pytest.mark.parametrize("rows,columns,width", [(19, 96, 16), (1, 40, 10)])
def test_sweeps(grid: Grid, rows: int, columns: int, width: int) -> None:
    """First and later sweeps; a tile of rows and a part of one, a block of columns and a part of one."""
    _sweep_both(_Problem(grid, rows, columns, width))


def test_sweeps_of_wide_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns than a wide block has, under scales of whole rows."""
    monkeypatch.setattr(_module("column_sweep"), "WIDE", 128)
    _sweep_both(_Problem(INT4, 3, 210, 210))


def _sweep_both(problem: _Problem) -> None:
    twin = _module("column_sweep")
    scales = (problem.scale_BOC, problem.zero_BOC, problem.orders(), problem.grid)
    forward = (problem.target_BOI, None, _feedback(upper_root(problem.h_BII)))
    first = twin.sweep(*forward, *scales)
    problem.alike(first, eager.sweep(*forward, *scales))
    a_BII = problem.h_BII / problem.h_BII.diagonal(dim1=1, dim2=2)[..., None]
    a_BII.diagonal(dim1=1, dim2=2).zero_()
    later = twin.sweep(problem.target_BOI, first, a_BII, *scales)
    problem.alike(later, eager.sweep(problem.target_BOI, first, a_BII, *scales))
    assert not torch.equal(first, later)


@GRIDS
@pytest.mark.parametrize("rows,columns,width", [(11, 64, 16), (1, 40, 10)])
def test_refits(grid: Grid, rows: int, columns: int, width: int) -> None:
    """Values, and the candidates named; the last is as good as the second."""
    _refit(_Problem(grid, rows, columns, width), (1.0, 0.9, 1.1, 0.9))


@pytest.mark.parametrize(
    "columns,width,ratios", [(144, 16, (1.0,)), (192, 64, (1.0, 0.9)), (256, 128, (1.0, 0.8, 0.9, 1.05, 1.1))]
)
def test_refits_of_wide_blocks(
    columns: int, width: int, ratios: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More columns than a wide block has; the widest groups."""
    monkeypatch.setattr(_module("column_sweep"), "WIDE", 128)
    _refit(_Problem(E2M1, 3, columns, width), ratios)


def _refit(problem: _Problem, ratios: tuple[float, ...]) -> None:
    columns, width = problem.h_BII.shape[1], problem.width
    scale_BOCK = problem.scale_BOC[..., None] * torch.tensor(ratios, device=DEVICE)
    zero_BOCK = problem.zero_BOC[..., None].expand_as(scale_BOCK)
    group_BI = (torch.arange(columns, device=DEVICE) // width).expand(2, -1)
    a_BII = _feedback(upper_root(problem.h_BII))
    scales = (problem.scale_BOC, problem.zero_BOC, group_BI, problem.grid)
    chosen_BOI = eager.sweep(problem.target_BOI, None, a_BII, *scales)
    before_BOI = chosen_BOI.clone()
    arguments = (
        problem.target_BOI,
        chosen_BOI,
        problem.h_BII,
        *problem.blocks(),
        scale_BOCK,
        zero_BOCK,
        problem.grid,
    )
    (ours, best), (theirs, expected) = _module("column_sweep").refit(*arguments), eager.refit(*arguments)
    problem.alike(ours, theirs)
    assert best.dtype == expected.dtype
    assert best.shape == expected.shape
    assert float((best != expected).float().mean()) < 0.02
    assert torch.equal(chosen_BOI, before_BOI), "an argument was overwritten"
