"""What a task's items say of two models, compared item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from compressor.evals.units import CONFIDENCE
from compressor.numerics.paired import (
    Answers,
    Interval,
    difference_interval,
    mcnemar,
    ratio_interval,
    recovery_interval,
)


@dataclass(frozen=True)
class TaskResult:
    """One model on one task.

    Attributes:
        name: the task.
        scores: metric (``acc``, ``acc_norm``) -> of each item, in their order: whether it was answered
            rightly, or how well; of several seeds the mean.
        lower_is_better: metrics of which less is better.
        seeds: how many times the items were asked, with other draws.
    """

    name: str
    scores: dict[str, tuple[float, ...]]
    lower_is_better: frozenset[str] = frozenset()
    seeds: int = 1

    def accuracy(self, metric: str = "acc") -> float:
        """Mean over the items."""
        items = self.scores[metric]
        return sum(items) / len(items)


@dataclass(frozen=True)
class MetricComparison:
    """One metric of one task, source against result on the same items.

    Attributes:
        source: mean over the items by the source.
        result: the same by the result.
        difference: result - source.
        stderr: standard error of ``difference``, paired over items.
        n: items.
        lost: items that only the source answered rightly; None where answers are more or less right.
        gained: items that only the result answered rightly; None likewise.
        p_value: exact two-sided McNemar test of ``lost`` against ``gained``; None likewise.
        difference_ci95: interval of ``difference``; None where items are too few.
        recovery: result / source; None where less is better, or the source has nothing.
        recovery_ci95: its interval.
        higher_is_better: as the task declares it.
        seeds: how many times the items were asked.
        answers: counts, where each is right or wrong.
        scores: of source and result, where each is more or less right.
    """

    source: float
    result: float
    difference: float
    stderr: float
    n: int
    lost: int | None
    gained: int | None
    p_value: float | None
    difference_ci95: Interval | None
    recovery: float | None
    recovery_ci95: Interval | None
    higher_is_better: bool = True
    seeds: int = 1
    answers: Answers | None = None
    scores: tuple[tuple[float, ...], tuple[float, ...]] | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """JSON-able, by attribute; without the items."""
        return {name: value for name, value in vars(self).items() if name not in ("answers", "scores")}


@dataclass(frozen=True)
class TaskComparison:
    """One task, all its metrics."""

    name: str
    metrics: dict[str, MetricComparison]

    @property
    def main(self) -> str:
        """The metric that gates are held against: ``acc``, else the first that the task declares."""
        return "acc" if "acc" in self.metrics else next(iter(self.metrics))

    def to_json(self) -> dict[str, Any]:
        """Metric -> its figures."""
        return {metric: figures.to_json() for metric, figures in self.metrics.items()}


def compare_tasks(source: TaskResult, result: TaskResult, seed: int = 0) -> TaskComparison:
    """Source against result, item by item; both must have run on the same items. ``seed``: of intervals."""
    assert source.name == result.name
    assert source.scores.keys() == result.scores.keys()
    metrics = {
        metric: _paired(
            source.scores[metric],
            result.scores[metric],
            higher=metric not in source.lower_is_better,
            seeds=source.seeds,
            seed=seed,
        )
        for metric in source.scores
    }
    return TaskComparison(source.name, metrics)


def _paired(
    source: Sequence[float], result: Sequence[float], *, higher: bool, seeds: int, seed: int
) -> MetricComparison:
    assert len(source) == len(result) > 0
    n = len(source)
    more = [after - before for before, after in zip(source, result, strict=True)]
    difference = sum(more) / n
    variance = sum(one**2 for one in more) / n - difference**2
    answers = _answers(source, result)
    before, after = sum(source) / n, sum(result) / n
    recovery = after / before if higher and before > 0 else None
    if answers is not None:
        found: Interval | None = difference_interval(answers, CONFIDENCE)
        kept = recovery_interval(answers, CONFIDENCE)
    else:
        found = ratio_interval(more, [1.0] * n, CONFIDENCE, seed)
        kept = ratio_interval(result, source, CONFIDENCE, seed)
    return MetricComparison(
        source=before,
        result=after,
        difference=difference,
        stderr=sqrt(max(variance, 0.0) / max(n - 1, 1)),
        n=n,
        lost=answers.lost if answers else None,
        gained=answers.gained if answers else None,
        p_value=mcnemar(answers.lost, answers.gained) if answers else None,
        difference_ci95=found,
        recovery=recovery,
        recovery_ci95=kept if recovery is not None else None,
        higher_is_better=higher,
        seeds=seeds,
        answers=answers,
        scores=None if answers else (tuple(source), tuple(result)),
    )


def _answers(source: Sequence[float], result: Sequence[float]) -> Answers | None:
    """Counts, where every score is 0 or 1."""
    if {*source, *result} <= {0, 1}:
        return Answers.of([bool(score) for score in source], [bool(score) for score in result])
    return None
