"""How recipes spell solvers that hold others, and what they may not hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from compressor.schemes import parse_scheme
from compressor.solvers import SolverField, parse_solver
from compressor.solvers.gptq import Gptq
from compressor.solvers.learned import Learned
from compressor.solvers.rtn import Rtn
from compressor.solvers.statistics import MomentSums


@pytest.mark.parametrize(
    ("spelling", "same", "label"),
    [
        ("learned", {"kind": "learned"}, "learned"),
        ("rtn+learned", {"kind": "learned", "start": "rtn"}, "learned"),
        ("gptq+learned", {"kind": "learned", "start": {"kind": "gptq"}}, "gptq+learned"),
        ("gptq + learned", {"kind": "gptq+learned"}, "gptq+learned"),
    ],
)
def test_joined_names(spelling: str, same: dict[str, Any], label: str) -> None:
    """Names joined by "+" are the mapping that holds one solver in another; what is dumped can be read."""
    solver = parse_solver(spelling)
    assert solver == parse_solver(same)
    assert solver.label == label
    assert parse_solver(solver.model_dump(mode="json")) == solver
    assert parse_solver(label) == solver


@pytest.mark.parametrize(
    ("spelling", "told"),
    [
        ("rtn+gptq", "cannot be joined as 'rtn\\+gptq'.*smooth before it and learned after it"),
        ("learned+gptq", "cannot be joined"),
        ("learned+learned", "cannot be joined"),
        ("llmcompressor+learned", "cannot be joined"),
        ("gptq+lerned", "unknown solver 'lerned'; did you mean 'learned'"),
        ("gptq+gptq", "cannot be joined"),
        ("gptq+", "name of a solver is missing beside '\\+' in 'gptq\\+'"),
        ("+", "is missing beside"),
        ({"kind": "+gptq"}, "is missing beside"),
        ("autoround", "learned"),
        ("gptq+polish", "stage after the solver: set weights.polish"),
        ({"kind": "gptq+learned", "steps": 3}, "the one inside the other"),
        (
            {"kind": "smooth+gptq", "search": "full"},
            "each with its own: {kind: smooth, then: {kind: gptq, ...}, ...}",
        ),
        ({"kind": "learned", "start": "learned"}, "cannot start from learned"),
        ({"kind": "learned", "start": "smooth+gptq"}, "{kind: smooth, then: {kind: learned, ...}}"),
        (
            {"kind": "learned", "start": {"kind": "llmcompressor", "modifiers": ["GPTQModifier"]}},
            "cannot start",
        ),
        ({"kind": "learned", "steps": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_joined(spelling: str | dict[str, Any], told: str) -> None:
    """The message names what can."""
    with pytest.raises(ValueError, match=told):
        parse_solver(spelling)


def test_what_it_asks_of_the_walk() -> None:
    """Always the states that the result computes; moments only where the solver before it hears them."""
    plain, after_gptq = parse_solver("learned"), parse_solver("gptq+learned")
    assert isinstance(plain, Learned)
    assert plain.learning is plain
    assert plain.smoothing is None
    assert plain.needs_calibration
    assert not plain.needs_moments
    assert after_gptq.needs_moments
    assert Rtn().learning is None
    assert isinstance(after_gptq, Learned)
    assert plain.first_rate > after_gptq.first_rate
    assert Learned(learning_rate=0.01).first_rate == 0.01


def test_solving_is_the_start_solvers() -> None:
    """Bit for bit, with moments and without; ``used`` is the name of the solver that did it."""
    weight_OI = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    x_NI = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    scheme = parse_scheme("nvfp4a16")
    sums = MomentSums(64, "cpu", False)
    sums.add(x_NI)
    moments = sums.result()
    solver = parse_solver("gptq+learned")
    pairs = [
        (solver.solve([weight_OI], scheme), Gptq().solve([weight_OI], scheme)),
        (
            solver.solve_heard([weight_OI], scheme, moments),
            Gptq().solve_heard([weight_OI], scheme, moments),
        ),
        (
            solver.solve_groups([([weight_OI], moments)], scheme)[0],
            Gptq().solve_groups([([weight_OI], moments)], scheme)[0],
        ),
    ]
    for (found,), (expected,) in pairs:
        assert found.used == expected.used
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("outer", ["", "smooth+", "smooth + ", "Smooth+", "awq+", "+"])
@pytest.mark.parametrize("chooser", ["gptq", "rtn", "learned", "llmcompressor", "gptq+gptq", "smooth", "g-q"])
@pytest.mark.parametrize("last", ["", "+learned", " + learned ", "+Learned", "+rtn", "+"])
def test_schema_takes_the_joined_names_that_the_parser_takes(outer: str, chooser: str, last: str) -> None:
    """Editors that check recipes against the schema accept what a run accepts, and nothing else."""
    spelling = f"{outer}{chooser}{last}"
    if "+" not in spelling:
        return
    ways = TypeAdapter(SolverField).json_schema()["anyOf"]
    [pattern] = [way["pattern"] for way in ways if "pattern" in way]
    [of_kind] = [
        way["properties"]["kind"] for way in ways if "pattern" in way.get("properties", {}).get("kind", {})
    ]
    try:
        parse_solver(spelling)
    except ValueError:
        taken = False
    else:
        taken = True
    assert bool(re.search(pattern, spelling)) == taken
    assert of_kind["pattern"] == pattern


def test_docs_tell_the_default_learning_rates() -> None:
    """Of the first step, by the number of steps."""
    plain, after_gptq = (Learned(steps=1, start=start).first_rate for start in (Rtn(), Gptq()))
    docs = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")
    assert f"`learning_rate` ({plain} / steps; {after_gptq} / steps after `gptq`)" in docs
