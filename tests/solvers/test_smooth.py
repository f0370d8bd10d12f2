"""How recipes spell smoothing, what may follow it, and that it leaves the values to that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor.schemes import parse_scheme
from compressor.solvers import parse_solver
from compressor.solvers.gptq import Gptq
from compressor.solvers.learned import Learned
from compressor.solvers.rtn import Rtn
from compressor.solvers.smooth import Smooth
from compressor.solvers.statistics import MomentSums


@pytest.mark.parametrize(
    ("spelling", "same", "label"),
    [
        ("smooth", {"kind": "smooth"}, "smooth"),
        ("smooth+rtn", {"kind": "smooth", "then": "rtn"}, "smooth"),
        ("smooth+gptq", {"kind": "smooth", "then": {"kind": "gptq"}}, "smooth+gptq"),
        ("smooth+learned", {"kind": "smooth", "then": "learned"}, "smooth+learned"),
        ("smooth+gptq+learned", {"kind": "smooth", "then": "gptq+learned"}, "smooth+gptq+learned"),
    ],
)
def test_spelling(spelling: str, same: dict[str, Any], label: str) -> None:
    """Names joined by "+" are the mapping; what is dumped can be read again."""
    solver = parse_solver(spelling)
    assert solver == parse_solver(same)
    assert solver.label == label
    assert parse_solver(solver.model_dump(mode="json")) == solver
    assert solver.smoothing is solver


@pytest.mark.parametrize(
    ("spelling", "told"),
    [
        ("gptq+smooth", "cannot be joined"),
        ("smooth+llmcompressor", "cannot be joined"),
        ({"kind": "smooth", "then": "smooth+gptq"}, r"smooth\+gptq cannot follow smooth"),
        (
            {"kind": "smooth", "then": {"kind": "llmcompressor", "modifiers": ["GPTQModifier"]}},
            "cannot follow",
        ),
        ({"kind": "smooth", "search": "none"}, "full"),
    ],
)
def test_what_cannot_follow(spelling: str | dict[str, Any], told: str) -> None:
    """The message names what can."""
    with pytest.raises(ValueError, match=told):
        parse_solver(spelling)


def test_what_it_asks_of_the_walk() -> None:
    """Always a walk; moments and learning only where the solver that follows wants them."""
    plain, gptq = Smooth(), Smooth(then=Gptq())
    learned = Smooth(then=Learned(start=Gptq()))
    assert all(solver.needs_calibration for solver in (plain, gptq, learned))
    assert [solver.needs_moments for solver in (plain, gptq, learned)] == [False, True, True]
    assert plain.learning is None
    assert learned.learning is not None
    assert plain.bytes_per_s < Rtn().bytes_per_s
    assert Rtn().smoothing is None


def test_values_are_those_of_what_follows() -> None:
    """The walk scales the weights; the solver itself does nothing but pass them on."""
    scheme = parse_scheme("nvfp4a16")
    weights = [torch.randn(8, 32, generator=torch.Generator().manual_seed(1))]
    sums = MomentSums(32, "cpu", with_change=False)
    sums.add(torch.randn(64, 32, generator=torch.Generator().manual_seed(2)))
    for inner in (Rtn(), Gptq()):
        ours = Smooth(then=inner)
        pairs = [
            (ours.solve(weights, scheme), inner.solve(weights, scheme)),
            (
                ours.solve_groups([(weights, sums.result())], scheme)[0],
                inner.solve_groups([(weights, sums.result())], scheme)[0],
            ),
        ]
        for mine, theirs in pairs:
            for name, tensor in theirs[0].tensors.items():
                assert torch.equal(mine[0].tensors[name].view(torch.uint8), tensor.view(torch.uint8))
