"""The search for a loss, with losses that are known: a judge that adds up what each option truly costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from compressor.budget.knapsack import Option, smallest_mix
from compressor.calibration.spec import CalibrationSpec, DatasetSpec
from compressor.errors import UserError
from compressor.schemes import parse_scheme
from compressor.solvers import parse_solver
from compressor.stages.budget import Choosing
from compressor.stages.budget_judge import Judged
from compressor.stages.budget_spec import Goal, Group, SensitivityJob, Stored
from compressor.stages.walk import WalkSpec

WALK = WalkSpec(batch_tokens=64, dtype="float32", states="host", moment_bytes=1, keep_inputs=False)
NAMES = ("nvfp4a16", "int8", "copy")


def _job(groups: int, *, copy: bool = True) -> SensitivityJob:
    """Groups of two sizes, each with the same options."""
    made = []
    for number in range(groups):
        size = 1000 * (1 + number % 2)
        options = [
            Stored(name, parse_scheme(name), size * bits) for name, bits in (("nvfp4a16", 4), ("int8", 8))
        ]
        options += [Stored("copy", None, size * 16)] if copy else []
        made.append(Group(f"g{number}", 0, (), tuple(options)))
    calibration = CalibrationSpec((DatasetSpec("x"),), num_samples=8, sequence_length=8)
    return SensitivityJob(tuple(made), parse_solver("rtn"), calibration, WALK, "cpu", 0)


def _costs(job: SensitivityJob) -> dict[str, dict[str, float]]:
    return {
        group.name: {"nvfp4a16": 0.002 + 0.0004 * number, "int8": 0.0001, "copy": 0.0}
        for number, group in enumerate(job.groups)
    }


class _Judge:
    """Losses that grow faster than costs, as they do where groups' errors add up."""

    def __init__(self, costs: Mapping[str, Mapping[str, float]], width: float = 0.0) -> None:
        self._costs, self._width = costs, width
        self.asked: list[str] = []

    def measure(self, chosen: Mapping[str, Stored], note: str) -> Judged:
        self.asked.append(note)
        cost = sum(self._costs[name][option.name] for name, option in chosen.items())
        loss = 1.2 * cost + 2 * cost**2
        return Judged(cost, loss, (loss - self._width, loss + self._width))


def _goal(**changes: object) -> Goal:
    return replace(Goal("said", None, None, 1000, 0, 0), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("width", [0.0, 0.01])
def test_finds_nearly_the_smallest_mix_that_keeps_to_the_loss(
    limit: float, width: float, tmp_path: Path
) -> None:
    """Within a percent of the best that any bound on the costs gives, in eight judgements at most."""
    job = _job(60)
    costs = _costs(job)
    judge = _Judge(costs, width)
    work = Choosing(job, _goal(max_increase=limit), costs, judge, tmp_path)
    mix = work.within_loss()
    assert 1.2 * mix.cost + 2 * mix.cost**2 + width <= limit
    # The largest cost that the loss allows, from the quadratic.
    allowed = (-1.2 + (1.2**2 + 8 * (limit - width)) ** 0.5) / 4
    options = [
        [Option(of.name, of.nbytes, costs[group.name][of.name]) for of in group.options]
        for group in job.groups
    ]
    assert mix.nbytes <= 1.01 * smallest_mix(options, allowed).nbytes
    assert len(judge.asked) <= 8
    (chosen,) = [point for point in work.points() if point["kind"] == "chosen"]
    assert chosen["bytes"] == mix.nbytes


def test_the_smallest_mix_may_do(tmp_path: Path) -> None:
    """Then nothing else is judged."""
    job = _job(6)
    costs = _costs(job)
    judge = _Judge(costs)
    mix = Choosing(job, _goal(max_increase=0.5), costs, judge, tmp_path).within_loss()
    assert set(mix.chosen) == {0}
    assert len(judge.asked) == 1


def test_a_loss_that_no_candidate_keeps_to_is_refused(tmp_path: Path) -> None:
    """Where 16 bit is no candidate."""
    job = _job(6, copy=False)
    costs = _costs(job)
    work = Choosing(job, _goal(max_increase=1e-5), costs, _Judge(costs), tmp_path)
    with pytest.raises(UserError, match="no mix of the candidates"):
        work.within_loss()


def test_what_cannot_be_tried_gets_the_most_exact_candidate(tmp_path: Path) -> None:
    """And costs nothing that is known."""
    job = _job(3)
    costs: dict[str, dict[str, float] | None] = {**_costs(job), "g1": None}
    total = sum(option.nbytes for group in job.groups for option in group.options)
    known = {name: found or dict.fromkeys(NAMES, 0.0) for name, found in costs.items()}
    work = Choosing(job, _goal(group_bytes=44_000), costs, _Judge(known), tmp_path)
    mix = work.within_bytes()
    assert work.named(mix)["g1"] == "copy"
    assert mix.nbytes <= 44_000 < total
    told = {group["name"]: group for group in work.groups_told(mix)}
    assert [option["cost"] for option in told["g1"]["options"]] == [None] * 3


def test_what_was_judged_is_kept_for_a_rerun(tmp_path: Path) -> None:
    """The second time nothing is asked, and everything is as it was."""
    job = _job(20)
    costs = _costs(job)
    first, second = _Judge(costs), _Judge(costs)
    works = [Choosing(job, _goal(max_increase=0.03), costs, judge, tmp_path) for judge in (first, second)]
    mixes = [work.within_loss() for work in works]
    for work, mix in zip(works, mixes, strict=True):
        work.judge_controls(mix)
    assert first.asked
    assert not second.asked
    assert works[0].points() == works[1].points()
    kinds = [point["kind"] for point in works[0].points()]
    assert (kinds.count("chosen"), kinds.count("uniform"), kinds.count("random")) == (1, 2, 2)
