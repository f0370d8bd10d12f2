"""Statistics of two models on the same units (documents, items): what differs, and how surely.

Units are drawn alike from all that might have been asked, and depend on each other no further. Importing this
does not import torch.

Legend: N units, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, comb, exp, expm1, inf, isfinite, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RESAMPLES = 2000
# Fewer units than these, drawn again, are too often one and the same.
FEWEST_UNITS = 4
_POWER = 0.8
_MOST_UNITS = 10**9
_HALVINGS = 60

Interval = tuple[float, float]


@dataclass(frozen=True)
class Answers:
    """How two models answered the same items, counted.

    Attributes:
        both: items that both answered rightly.
        lost: items that only the source answered rightly.
        gained: items that only the result did.
        neither: items that neither did.
    """

    both: int
    lost: int
    gained: int
    neither: int

    @classmethod
    def of(cls, source: Sequence[bool], result: Sequence[bool]) -> Answers:
        """Counts the answers to the same items, in the same order."""
        pairs = [(bool(before), bool(after)) for before, after in zip(source, result, strict=True)]
        return cls(*map(pairs.count, [(True, True), (True, False), (False, True), (False, False)]))

    @property
    def items(self) -> int:
        """All of them."""
        return self.both + self.lost + self.gained + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the result less that of the source."""
        return (self.gained - self.lost) / self.items

    @property
    def recovery(self) -> float | None:
        """Accuracy of the result over that of the source; None where the source has none."""
        right = self.both + self.lost
        return (self.both + self.gained) / right if right else None

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Both, lost, gained, neither."""
        return self.both, self.lost, self.gained, self.neither


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of ``lost`` of ``lost + gained`` at one half, in exact integers (McNemar 1947)."""
    discordant = lost + gained
    tail = sum(comb(discordant, count) for count in range(min(lost, gained) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**discordant)))


def difference_interval(answers: Answers, confidence: float) -> Interval:
    """Score interval of the difference of two accuracies on the same items.

    Tango 1998 (Statistics in Medicine 17, 891): the differences that the score test does not refuse. It has
    a width where no item differs, and holds its confidence with few items.
    """
    return _score_interval(answers, _differences, confidence, -1.0, 1.0)


def recovery_interval(answers: Answers, confidence: float) -> Interval | None:
    """The same of their ratio (Nam and Blackwelder 2002, Statistics in Medicine 21, 689).

    None where the source answered nothing rightly; the high end may be infinite.
    """
    if answers.recovery is None:
        return None
    high = 2.0
    while high < _MOST_UNITS and _score(answers, _ratios(high)) > -_quantile(confidence):
        high *= 2
    return _score_interval(answers, _ratios, confidence, 0.0, high if high < _MOST_UNITS else inf)


def ratio_interval(
    values_N: Sequence[float], weights_N: Sequence[float], confidence: float, seed: int
) -> Interval | None:
    """Bootstrap-t interval of sum(values) / sum(weights), units drawn again in pairs.

    Efron and Tibshirani 1993, section 12.5: each draw's deviation is divided by its own standard error, which
    holds the confidence better than plain percentiles where units are few or lean to a side. None with fewer
    than ``FEWEST_UNITS``.
    """
    import torch

    count = len(values_N)
    if count < FEWEST_UNITS:
        return None
    value_N = torch.tensor(values_N, dtype=torch.float64)
    weight_N = torch.tensor(weights_N, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    # In parts: a million units times all resamples fit into no memory.
    rows = max(1, 2**22 // count)
    ratio, error = _ratio(value_N[None], weight_N[None])
    parts = []
    for drawn in range(0, RESAMPLES, rows):
        chosen_RN = torch.randint(count, (min(rows, RESAMPLES - drawn), count), generator=generator)
        parts.append(_ratio(value_N[chosen_RN], weight_N[chosen_RN]))
    ratio_R, error_R = (torch.cat(found) for found in zip(*parts, strict=True))
    away_R = ratio_R - ratio
    # Of units drawn that are all the same, nothing is known but the side.
    t_R = torch.where(away_R == 0, 0.0, away_R / error_R).sort().values
    tail = ceil((1 - confidence) / 2 * (RESAMPLES + 1)) - 1
    low, high = float(ratio - t_R[RESAMPLES - 1 - tail] * error), float(ratio - t_R[tail] * error)
    return (low, high) if isfinite(low) and isfinite(high) else None


def _ratio(value_RN: torch.Tensor, weight_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ratios [R] of the sums, and their standard errors by linearization."""
    count = value_RN.shape[1]
    weight_R = weight_RN.sum(1)
    ratio_R = value_RN.sum(1) / weight_R
    squares_R = (value_RN - ratio_R[:, None] * weight_RN).square().sum(1)
    return ratio_R, (squares_R * count / (count - 1)).sqrt() / weight_R


def ratio_units_needed(
    values_N: Sequence[float], weights_N: Sequence[float], bound: float, confidence: float
) -> int | None:
    """How many units would tell on which side of ``bound`` the ratio lies, see ``units_needed``."""
    count = len(values_N)
    if count < 2:
        return None
    away = [value - bound * weight for value, weight in zip(values_N, weights_N, strict=True)]
    mean = sum(away) / count
    deviation = sqrt(sum((one - mean) ** 2 for one in away) / (count - 1))
    return units_needed(mean, deviation, deviation, confidence)


def difference_items_needed(answers: Answers, bound: float, confidence: float) -> int | None:
    """How many items would tell on which side of ``bound`` the difference lies, see ``units_needed``."""
    return _items_needed(answers, _differences(bound), confidence)


def recovery_items_needed(answers: Answers, bound: float, confidence: float) -> int | None:
    """How many items would tell on which side of ``bound`` the recovery lies, see ``units_needed``."""
    return _items_needed(answers, _ratios(bound), confidence)


def units_needed(mean: float, null_deviation: float, deviation: float, confidence: float) -> int | None:
    """Units with which a two-sided test of mean zero is refused with four chances in five.

    The usual normal approximation (Connor 1987, Biometrics 43, 207, for paired items).

    Args:
        mean: of a unit, if what was measured is the truth.
        null_deviation: standard deviation of a unit where the mean is zero.
        deviation: the same where it is ``mean``.
        confidence: of the interval.

    Returns:
        None where the mean is zero or nearly so: no number of units would tell.
    """
    if mean == 0:
        return None
    reach = _quantile(confidence) * null_deviation + NormalDist().inv_cdf(_POWER) * deviation
    units = (reach / mean) ** 2
    return max(FEWEST_UNITS, ceil(units)) if units < _MOST_UNITS else None


def untold_units(units: int, confidence: float) -> int:
    """How many units it takes at least where an interval of so many does not tell.

    Half of its width is more than the distance to the bound, and shrinks with the root of their number. The
    approximation of ``units_needed`` does not know how much wider it is where few units lean to a side.
    """
    quantile = _quantile(confidence)
    return ceil(units * ((quantile + NormalDist().inv_cdf(_POWER)) / quantile) ** 2)


def relative_change(nats: float) -> float:
    """By how much the exponential of a mean grows when the mean does: infinite where no float holds it."""
    try:
        return expm1(nats)
    except OverflowError:
        return inf


def exponential(nats: float) -> float:
    """The exponential of a mean: infinite where no float holds it."""
    try:
        return exp(nats)
    except OverflowError:
        return inf


def _items_needed(answers: Answers, values: Sequence[float], confidence: float) -> int | None:
    counts, items = answers.counts, answers.items
    mean = sum(count * value for count, value in zip(counts, values, strict=True)) / items
    square = sum(count * value**2 for count, value in zip(counts, values, strict=True)) / items
    null = sqrt(_null_variance(counts, values))
    # Where nothing differs, what varies is known from the test alone.
    deviation = sqrt(max(square - mean**2, 0.0)) or null
    return units_needed(mean, null, deviation, confidence)


# What an item of each of ``Answers.counts`` adds to a sum that has mean zero at the bound.
def _differences(bound: float) -> tuple[float, float, float, float]:
    return -bound, -1 - bound, 1 - bound, -bound


def _ratios(bound: float) -> tuple[float, float, float, float]:
    return 1 - bound, -bound, 1.0, 0.0


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _score_interval(
    answers: Answers,
    values: Callable[[float], Sequence[float]],
    confidence: float,
    lowest: float,
    highest: float,
) -> Interval:
    """Between the bounds where the score is the quantile of either side; it falls as the bound rises."""

    def bisect(low: float, high: float, wanted: float) -> float:
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if _score(answers, values(middle)) > wanted:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    quantile = _quantile(confidence)
    top = highest if isfinite(highest) else float(_MOST_UNITS)
    high = bisect(lowest, top, -quantile)
    return bisect(lowest, top, quantile), high if isfinite(highest) else inf


def _score(answers: Answers, values: Sequence[float]) -> float:
    """The sum of the items' values over its standard deviation, where their mean is zero."""
    total = sum(count * value for count, value in zip(answers.counts, values, strict=True))
    variance = answers.items * _null_variance(answers.counts, values)
    if variance <= 0:
        return inf if total > 0 else -inf if total < 0 else 0.0
    return total / sqrt(variance)


def _null_variance(counts: Sequence[int], values: Sequence[float]) -> float:
    """Mean square of a value under the likeliest shares of the four kinds whose mean value is zero.

    The shares are n_k / (n (1 + m v_k)) with the multiplier m that makes their mean zero; a kind that was
    never met gets a share only where the others cannot do without (Owen 2001, Empirical Likelihood, 2.9).
    """
    items = sum(counts)
    least, most = min(values), max(values)
    if least >= 0 or most <= 0:
        return 0.0

    def mean(multiplier: float) -> float:
        return sum(
            count * value / (1 + multiplier * value)
            for count, value in zip(counts, values, strict=True)
            if count
        )

    low, high = -1 / most, -1 / least
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if mean(middle) > 0:
            low = middle
        else:
            high = middle
    multiplier = (low + high) / 2
    shares = [
        count / (items * (1 + multiplier * value)) if count else 0.0
        for count, value in zip(counts, values, strict=True)
    ]
    # What is left is of a kind that was never met, at the end that the multiplier came to.
    missing = max(0.0, 1 - sum(shares))
    end = most if multiplier < 0 else least
    return sum(share * value**2 for share, value in zip(shares, values, strict=True)) + missing * end**2
