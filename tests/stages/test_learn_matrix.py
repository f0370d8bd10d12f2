"""A learned matrix against a slow second implementation: what it stores, its gradients, where it may go."""

from __future__ import annotations

import pytest
import torch

from compressor.schemes import parse_scheme
from compressor.schemes.base import Scheme
from compressor.solvers import parse_solver
from compressor.stages.learn_matrix import SCALE_RATE, LearnedMatrix
from tests.schemes.cases import LABELS, SCHEMES, applicable, matrices

_KINDS = [
    {"kind": "nvfp4a16"},
    {"kind": "int4", "group_size": 32},
    {"kind": "int4", "group_size": 32, "symmetric": False},
    {"kind": "mxfp4"},
    {"kind": "fp8_dynamic"},
    {"kind": "fp8_block"},
    {"kind": "fp8_static"},
]


def _solved(scheme: Scheme, weight_OI: torch.Tensor, solver: str = "rtn") -> dict[str, torch.Tensor]:
    return parse_solver(solver).solve([weight_OI], scheme)[0].tensors


@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
@pytest.mark.parametrize("name", ["mixed bf16", "tails bf16", "fp16", "tiny", "zero"])
def test_starts_where_the_solver_ended(scheme: Scheme, name: str) -> None:
    """Before any step: the numbers that the stored tensors decode to, and tensors that decode to them again.

    Bytes may differ in the sign of zeros.
    """
    weight_OI = matrices()[name]
    if not applicable(scheme, weight_OI):
        pytest.skip("not a shape for this scheme")
    tensors = _solved(scheme, weight_OI)
    matrix = LearnedMatrix(weight_OI.float(), scheme, tensors, scales=True)
    decoded_OI = scheme.decode(tensors, *weight_OI.shape)
    assert torch.equal(matrix.weight(), decoded_OI)
    again = matrix.tensors()
    assert {n: (t.dtype, t.shape) for n, t in again.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }
    assert torch.equal(scheme.decode(again, *weight_OI.shape), decoded_OI)


@pytest.mark.parametrize("spelling", _KINDS, ids=lambda spelling: str(spelling["kind"]))
def test_codes_of_another_solver_are_kept(spelling: dict[str, object]) -> None:
    """Codes far from the weights, as GPTQ chooses them, are what it starts with all the same."""
    scheme = parse_scheme(spelling)
    weight_OI = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    moved_OI = weight_OI + 0.3 * torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    tensors = _solved(scheme, moved_OI)
    matrix = LearnedMatrix(weight_OI, scheme, tensors, scales=True)
    assert torch.equal(matrix.weight(), scheme.decode(tensors, 128, 128))


@pytest.mark.parametrize("spelling", _KINDS, ids=lambda spelling: str(spelling["kind"]))
def test_steps_equal_autograd(spelling: dict[str, object]) -> None:
    """Five steps give what torch's Adam and autograd through straight-through rounding give.

    Where a group's gradients nearly cancel, sums in another order make another factor, whose scale may be
    stored as the next one: 2 values in 100 may differ. A wrong slope moves most groups the other way.
    """
    scheme = parse_scheme(spelling)
    weight_OI = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    tensors = _solved(scheme, weight_OI)
    matrix = LearnedMatrix(weight_OI, scheme, tensors, scales=True)
    slow = _Slow(weight_OI, scheme, tensors)
    generator = torch.Generator().manual_seed(2)
    for rate in (0.2, 0.16, 0.12, 0.08, 0.04):
        wanted_OI = torch.randn(24, 128, generator=generator)
        gradient_OI = 2 * (matrix.weight() - wanted_OI)
        slow.step(wanted_OI, rate)
        matrix.move(gradient_OI, rate)
        off = (slow.weight().detach() - matrix.weight()).abs() > 1e-5
        assert float(off.float().mean()) < 0.02
    started_OI = scheme.decode(tensors, 24, 128)
    assert float((matrix.weight() != started_OI).float().mean()) > 0.1
    stored_OI = scheme.decode(matrix.tensors(), 24, 128)
    assert torch.equal(stored_OI, matrix.weight()), "what is stored is what was computed with"


class _Slow:
    """Offsets and factors as leaves of autograd; the grid as a list of numbers that is looked through."""

    def __init__(self, weight_OI: torch.Tensor, scheme: Scheme, tensors: dict[str, torch.Tensor]) -> None:
        shape = (weight_OI.shape[0], weight_OI.shape[1])
        free = scheme.free_scales(tensors, *shape)
        lattice = scheme.lattice(scheme.scales(tensors, *shape), *shape)
        width = shape[1] // lattice.scale_OC.shape[1]
        self._scale_OI = lattice.scale_OC.repeat_interleave(width, dim=1)
        self._zero_OI = lattice.zero_OC.repeat_interleave(width, dim=1)
        low, high = int(lattice.grid.low), int(lattice.grid.high)
        numbers = lattice.grid.byte_values().tolist()
        is_int = lattice.grid.kind == "int"
        self._grid = sorted(set(range(low, high + 1) if is_int else (x for x in numbers if x == x)))
        codes_OI = scheme.decode(tensors, *shape) / self._scale_OI + self._zero_OI
        wanted_OI = weight_OI / self._scale_OI + self._zero_OI
        begun = [
            self._begin(code, wanted)
            for code, wanted in zip(codes_OI.flatten().tolist(), wanted_OI.flatten().tolist(), strict=True)
        ]
        self._position_OI = torch.tensor([position for position, _ in begun]).view(shape)
        self._gap_OI = torch.tensor([gap for _, gap in begun]).view(shape)
        self._offset = torch.zeros(shape, requires_grad=True)
        groups = [{"params": [self._offset], "rate": 1.0}]
        self._factor = None
        if free is not None:
            self._first_BC, self._group = free.scale_BC, free.group
            self._factor = torch.ones(free.scale_BC.shape, requires_grad=True)
            groups.append({"params": [self._factor], "rate": SCALE_RATE})
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-15)

    def _begin(self, code: float, wanted: float) -> tuple[float, float]:
        """Where a weight begins, and the width of the gap there."""
        grid = self._grid
        at = min(range(len(grid)), key=lambda index: abs(grid[index] - code))
        to = at + 1 if wanted > grid[at] else at - 1
        # beyond the ends as within
        inner = min(max(to, 0), len(grid) - 1)
        gap = abs(grid[inner] - grid[at]) if inner != at else abs(grid[at] - grid[2 * at - to])
        return grid[at] + min(max(wanted - grid[at], -0.45 * gap), 0.45 * gap), gap

    def weight(self) -> torch.Tensor:
        scale_OI = self._scale_OI
        if self._factor is not None:
            moved_BC = self._first_BC.float() * self._factor
            stored_BC = moved_BC.to(self._first_BC.dtype).float()
            ratio_BC = (stored_BC + moved_BC - moved_BC.detach()) / self._first_BC.float()
            rows, columns = self._group
            ratio_OI = ratio_BC.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
            scale_OI = scale_OI * ratio_OI[: len(scale_OI)]
        grid = torch.tensor(self._grid)
        position_OI = (self._position_OI + self._offset * self._gap_OI).detach()
        nearest_OI = grid[(position_OI[..., None] - grid).abs().argmin(dim=-1)]
        # Adam's steps do not depend on the width of a weight's cell, so it is left out of the gradient.
        return (nearest_OI - self._zero_OI) * scale_OI + (self._offset - self._offset.detach())

    def step(self, wanted_OI: torch.Tensor, rate: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = rate * group["rate"]
        self._adam.zero_grad()
        (self.weight() - wanted_OI).square().sum().backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        with torch.no_grad():
            self._offset.clamp_(-0.5, 0.5)
            if self._factor is not None:
                self._factor.clamp_(0.5, 1.5)


def test_bounds_and_the_way_back() -> None:
    """However long it is pushed, offsets and factors stay in bounds; ``go_back`` takes up what was kept."""
    scheme = parse_scheme({"kind": "int4", "group_size": 32})
    weight_OI = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    tensors = _solved(scheme, weight_OI)
    matrix = LearnedMatrix(weight_OI, scheme, tensors, scales=True)
    push_OI = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    matrix.move(push_OI, 0.1)
    matrix.keep()
    kept = matrix.tensors()
    for _ in range(50):
        matrix.move(push_OI, 0.5)
    ratio = matrix.tensors()["weight_scale"].float() / tensors["weight_scale"].float()
    # bf16 scales: half a unit in the last of 8 bits
    assert float(ratio.min()) >= 0.5 * (1 - 2**-8)
    assert float(ratio.max()) <= 1.5 * (1 + 2**-8)
    matrix.go_back()
    for name, tensor in matrix.tensors().items():
        assert torch.equal(tensor, kept[name])


def test_scales_stay_where_they_are_not_to_be_learned() -> None:
    """With ``scales`` off, or a format whose scales are no free numbers, codes alone change."""
    weight_OI = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    push_OI = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    for spelling, scales in (({"kind": "nvfp4a16"}, False), ({"kind": "mxfp4"}, True)):
        scheme = parse_scheme(spelling)
        tensors = _solved(scheme, weight_OI)
        matrix = LearnedMatrix(weight_OI, scheme, tensors, scales=scales)
        for _ in range(5):
            matrix.move(push_OI, 0.1)
        found = matrix.tensors()
        assert torch.equal(found["weight_scale"].view(torch.uint8), tensors["weight_scale"].view(torch.uint8))
        assert not torch.equal(found["weight_packed"], tensors["weight_packed"])
