"""What a gate judges: one metric, unit by unit, and what that says of all that was not measured.

JSON-able both ways, since gates are judged when the evaluation is long done. Importing this does not import
torch.

Legend: N units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log, log1p, nan
from typing import Any, ClassVar

from compressor.numerics.paired import (
    Answers,
    Interval,
    difference_interval,
    difference_items_needed,
    exponential,
    mcnemar,
    ratio_interval,
    ratio_units_needed,
    recovery_interval,
    recovery_items_needed,
    relative_change,
)


@dataclass(frozen=True)
class Finding:
    """One figure: a loss (larger is worse) or a recovery (1 where nothing is lost).

    Attributes:
        value: as measured.
        interval: at the confidence asked for; None where units are too few.
    """

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Sample:
    """One metric of source and result on the same units.

    Attributes:
        unit: what they are, in the plural: ``documents``, ``windows``, ``items``, ``texts``, ``prompts``.
    """

    unit: str
    kind: ClassVar[str] = ""

    @property
    def units(self) -> int:
        """How many."""
        raise NotImplementedError

    @property
    def p_value(self) -> float | None:
        """Of no difference, by McNemar's exact test; None where units are not right or wrong."""
        return None

    def loss(self, confidence: float, seed: int) -> Finding:
        """What was lost, in the units of ``max_increase``."""
        raise NotImplementedError

    def recovery(self, confidence: float, seed: int) -> Finding:
        """The share of the source's figure that is kept."""
        raise NotImplementedError

    def needed(self, bound: float, confidence: float, *, recovery: bool) -> int | None:
        """How many units would tell on which side of the bound it lies, see ``paired.units_needed``."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """What ``sample_from_json`` reads."""
        return {"kind": self.kind, **vars(self)}


@dataclass(frozen=True)
class TextSample(Sample):
    """Log-likelihoods: perplexity.

    Attributes:
        more_N: negative log-likelihood of the result less that of the source, nats.
        tokens_N: scored tokens.
    """

    more_N: tuple[float, ...]
    tokens_N: tuple[float, ...]
    kind: ClassVar[str] = "text"

    @property
    def units(self) -> int:
        """How many."""
        return len(self.more_N)

    def loss(self, confidence: float, seed: int) -> Finding:
        """Relative increase of the perplexity."""
        found = ratio_interval(self.more_N, self.tokens_N, confidence, seed)
        return Finding(
            relative_change(self._mean()), found and (relative_change(found[0]), relative_change(found[1]))
        )

    def recovery(self, confidence: float, seed: int) -> Finding:
        """Perplexity of the source over that of the result."""
        found = ratio_interval(self.more_N, self.tokens_N, confidence, seed)
        return Finding(exponential(-self._mean()), found and (exponential(-found[1]), exponential(-found[0])))

    def needed(self, bound: float, confidence: float, *, recovery: bool) -> int | None:
        """Units, of about the same size."""
        limit = (-log(bound) if bound > 0 else inf) if recovery else log1p(bound)
        return ratio_units_needed(self.more_N, self.tokens_N, limit, confidence)

    def _mean(self) -> float:
        return sum(self.more_N) / sum(self.tokens_N)


@dataclass(frozen=True)
class RatioSample(Sample):
    """A sum over a sum: divergence over tokens, which is a loss, or accepted over proposed, a recovery.

    Attributes:
        value_N: what is summed.
        weight_N: over what.
    """

    value_N: tuple[float, ...]
    weight_N: tuple[float, ...]
    kind: ClassVar[str] = "ratio"

    @property
    def units(self) -> int:
        """How many."""
        return len(self.value_N)

    def loss(self, confidence: float, seed: int) -> Finding:
        """The ratio, which is never negative."""
        total = sum(self.weight_N)
        if not total:
            return Finding(nan, None)
        found = ratio_interval(self.value_N, self.weight_N, confidence, seed)
        return Finding(sum(self.value_N) / total, found and (max(0.0, found[0]), max(0.0, found[1])))

    def recovery(self, confidence: float, seed: int) -> Finding:
        """The same: the ratio is a loss or a share, as the metric has it."""
        return self.loss(confidence, seed)

    def needed(self, bound: float, confidence: float, *, recovery: bool) -> int | None:
        """Units, of about the same size."""
        return ratio_units_needed(self.value_N, self.weight_N, bound, confidence)


@dataclass(frozen=True)
class AnswerSample(Sample):
    """Items that each model answered rightly or wrongly: how many of both, lost, gained, neither."""

    counts: tuple[int, int, int, int]
    kind: ClassVar[str] = "answers"

    @property
    def units(self) -> int:
        """How many."""
        return sum(self.counts)

    @property
    def p_value(self) -> float:
        """See ``Sample``."""
        return mcnemar(self.counts[1], self.counts[2])

    def loss(self, confidence: float, seed: int) -> Finding:
        """Accuracy lost."""
        answers = Answers(*self.counts)
        low, high = difference_interval(answers, confidence)
        return Finding(-answers.difference, (-high, -low))

    def recovery(self, confidence: float, seed: int) -> Finding:
        """Accuracy of the result over that of the source."""
        answers = Answers(*self.counts)
        value = answers.recovery
        return Finding(nan if value is None else value, recovery_interval(answers, confidence))

    def needed(self, bound: float, confidence: float, *, recovery: bool) -> int | None:
        """Items."""
        answers = Answers(*self.counts)
        if recovery:
            return recovery_items_needed(answers, bound, confidence)
        return difference_items_needed(answers, -bound, confidence)


@dataclass(frozen=True)
class ScoreSample(Sample):
    """Items that each model answered more or less rightly; ``higher_is_better`` as the task declares it."""

    source_N: tuple[float, ...]
    result_N: tuple[float, ...]
    higher_is_better: bool
    kind: ClassVar[str] = "scores"

    @property
    def units(self) -> int:
        """How many."""
        return len(self.source_N)

    def loss(self, confidence: float, seed: int) -> Finding:
        """Mean score lost."""
        worse = self._worse()
        found = ratio_interval(worse, [1.0] * len(worse), confidence, seed)
        return Finding(sum(worse) / len(worse), found)

    def recovery(self, confidence: float, seed: int) -> Finding:
        """Mean score of the result over that of the source; of what should be low the other way round."""
        kept, whole = self._kept()
        if sum(whole) <= 0:
            return Finding(nan, None)
        return Finding(sum(kept) / sum(whole), ratio_interval(kept, whole, confidence, seed))

    def needed(self, bound: float, confidence: float, *, recovery: bool) -> int | None:
        """Items."""
        if recovery:
            return ratio_units_needed(*self._kept(), bound, confidence)
        worse = self._worse()
        return ratio_units_needed(worse, [1.0] * len(worse), bound, confidence)

    def _worse(self) -> list[float]:
        sign = 1 if self.higher_is_better else -1
        return [sign * (one - other) for one, other in zip(self.source_N, self.result_N, strict=True)]

    def _kept(self) -> tuple[Sequence[float], Sequence[float]]:
        pair = (self.result_N, self.source_N)
        return pair if self.higher_is_better else (pair[1], pair[0])


_KINDS: dict[str, Callable[..., Sample]] = {
    kind.kind: kind for kind in (TextSample, RatioSample, AnswerSample, ScoreSample)
}


def sample_from_json(found: Mapping[str, Any]) -> Sample:
    """What ``Sample.to_json`` wrote, lists or tuples."""
    attributes = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if name != "kind"
    }
    return _KINDS[found["kind"]](**attributes)
