"""Paired statistics: against scipy and slow second implementations, and by simulation."""

from __future__ import annotations

import random
from itertools import product
from math import exp, inf, isclose, log, sqrt
from statistics import NormalDist, mean, stdev

import pytest

from compressor.numerics import paired
from compressor.numerics.paired import (
    Answers,
    difference_interval,
    difference_items_needed,
    mcnemar,
    ratio_interval,
    ratio_units_needed,
    recovery_interval,
    recovery_items_needed,
    units_needed,
)

stats = pytest.importorskip("scipy.stats")
optimize = pytest.importorskip("scipy.optimize")

KINDS = ((0.60, 0.06, 0.05, 0.29), (0.45, 0.15, 0.10, 0.30), (0.90, 0.02, 0.01, 0.07))


def _drawn(shares: tuple[float, ...], items: int, generator: random.Random) -> Answers:
    counts = [0] * 4
    for kind in generator.choices(range(4), shares, k=items):
        counts[kind] += 1
    return Answers(*counts)


def test_mcnemar_is_scipys_binomial_test() -> None:
    """Every small table; ``mcnemar`` needs no scipy itself."""
    for lost, gained in product(range(12), range(12)):
        expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert isclose(mcnemar(lost, gained), expected, rel_tol=1e-9)


def test_null_p_values_are_uniform_as_far_as_whole_numbers_allow() -> None:
    """No p-value is reached more often than it says; spread out at random over their steps they are uniform.

    Discrete p-values are too large; p minus a uniform part of the probability of the table's own p is uniform
    exactly (mid-p at random), which a Kolmogorov-Smirnov test must not refuse.
    """
    generator = random.Random(5)
    spread, plain = [], []
    discordant = 61
    for _ in range(3000):
        lost = sum(generator.random() < 0.5 for _ in range(discordant))
        p_value = mcnemar(lost, discordant - lost)
        # Tables that are as unlikely as this one.
        own = stats.binom.pmf(lost, discordant, 0.5) * (2 if 2 * lost != discordant else 1)
        plain.append(p_value)
        spread.append(p_value - generator.random() * own)
    assert stats.kstest(spread, "uniform").pvalue > 0.001
    for level in (0.01, 0.05, 0.2):
        # Four standard errors of 3,000 draws.
        most = level + 4 * sqrt(level * (1 - level) / 3000)
        assert sum(p_value <= level for p_value in plain) / 3000 <= most


def _slow_variance(counts: tuple[int, ...], values: tuple[float, ...]) -> float:
    """Mean square of the values under the likeliest shares with mean zero, by a general optimizer."""

    def unlikely(shares: list[float]) -> float:
        return -sum(
            count * log(max(share, 1e-300)) for count, share in zip(counts, shares, strict=True) if count
        )

    found = optimize.minimize(
        unlikely,
        [0.25] * 4,
        bounds=[(0, 1)] * 4,
        constraints=[
            {"type": "eq", "fun": lambda shares: sum(shares) - 1},
            {"type": "eq", "fun": lambda shares: sum(s * v for s, v in zip(shares, values, strict=True))},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return sum(share * value**2 for share, value in zip(found.x, values, strict=True))


@pytest.mark.parametrize("counts", [(60, 9, 4, 27), (20, 0, 3, 7), (12, 0, 0, 8), (0, 5, 2, 3), (9, 1, 0, 0)])
def test_score_intervals_end_where_the_score_test_turns(counts: tuple[int, int, int, int]) -> None:
    """At either end the score, with the variance of a general optimizer, is the normal quantile."""
    answers = Answers(*counts)
    quantile = NormalDist().inv_cdf(0.975)

    def score(values: tuple[float, ...]) -> float:
        total = sum(count * value for count, value in zip(counts, values, strict=True))
        return total / sqrt(answers.items * _slow_variance(counts, values))

    for end, wanted in zip(difference_interval(answers, 0.95), (quantile, -quantile), strict=True):
        assert score((-end, -1 - end, 1 - end, -end)) == pytest.approx(wanted, abs=2e-3)
    found = recovery_interval(answers, 0.95)
    assert found is not None
    for end, wanted in zip(found, (quantile, -quantile), strict=True):
        assert score((1 - end, -end, 1.0, 0.0)) == pytest.approx(wanted, abs=2e-3)


def test_a_published_interval() -> None:
    """Approval of a prime minister in two surveys (Agresti, Categorical Data Analysis, table 11.1).

    The paired difference of -0.04 has a standard error of 0.0095: with 1,600 people the score interval is the
    plain normal one to three places.
    """
    found = difference_interval(Answers(794, 150, 86, 570), 0.95)
    assert found == pytest.approx((-0.04 - 1.96 * 0.0095, -0.04 + 1.96 * 0.0095), abs=1e-3)


def test_intervals_of_extreme_tables() -> None:
    """Where no item differs the interval has a width still; where nothing was right there is no ratio."""
    low, high = difference_interval(Answers(30, 0, 0, 20), 0.95)
    assert low == pytest.approx(-high)
    # Tango 1998: z^2 / (n + z^2).
    assert high == pytest.approx(1.959964**2 / (50 + 1.959964**2), rel=1e-5)
    assert recovery_interval(Answers(0, 0, 3, 7), 0.95) is None
    # One item right before and nine after: how much better is hardly bounded.
    few = recovery_interval(Answers(0, 1, 9, 5), 0.95)
    assert few is not None
    assert few[1] > 20
    assert few[1] == inf or few[0] < 9 < few[1]
    all_right = recovery_interval(Answers(40, 0, 0, 0), 0.95)
    assert all_right is not None
    assert all_right[0] < 1 < all_right[1]


@pytest.mark.parametrize("shares", KINDS)
def test_score_intervals_hold_their_confidence(shares: tuple[float, ...]) -> None:
    """By simulation at 120 items, within four standard errors of 1,500 draws around 94% to 96%.

    The truth is in an interval where the score test does not refuse it: of some draws the intervals too.
    """
    generator = random.Random(11)
    difference, ratio = shares[2] - shares[1], (shares[0] + shares[2]) / (shares[0] + shares[1])
    quantile = NormalDist().inv_cdf(0.975)
    held = [0, 0]
    for draw in range(1500):
        answers = _drawn(shares, 120, generator)
        scores = (
            paired._score(answers, paired._differences(difference)),
            paired._score(answers, paired._ratios(ratio)),
        )
        inside = [abs(score) <= quantile for score in scores]
        held = [count + is_in for count, is_in in zip(held, inside, strict=True)]
        if draw < 15:
            found = recovery_interval(answers, 0.95)
            assert found is not None
            assert (found[0] <= ratio <= found[1]) is inside[1]
            low, high = difference_interval(answers, 0.95)
            assert (low <= difference <= high) is inside[0]
    for count in held:
        assert 0.918 < count / 1500 < 0.982


@pytest.mark.parametrize("units", [8, 16, 40])
def test_the_bootstrap_holds_its_confidence(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of documents of unlike lengths with errors that lean to a side; plain percentiles would hold less.

    The bounds are four standard errors of 400 draws around 93% to 96%: with eight units no interval is exact.
    """
    monkeypatch.setattr(paired, "RESAMPLES", 500)
    generator = random.Random(units)
    shift = exp(0.5 * 0.6**2)
    held = 0
    for draw in range(400):
        weights = [float(generator.randint(100, 1000)) for _ in range(units)]
        values = [weight * (0.2 + 0.1 * (generator.lognormvariate(0, 0.6) - shift)) for weight in weights]
        found = ratio_interval(values, weights, 0.95, draw)
        assert found is not None
        held += found[0] <= 0.2 <= found[1]
    assert 0.88 < held / 400 < 0.99


def test_the_bootstrap_of_a_mean_is_scipys() -> None:
    """With equal weights and many units it is the t interval of the mean, up to the error of its draws."""
    generator = random.Random(2)
    values = [generator.gauss(3, 1) for _ in range(300)]
    found = ratio_interval(values, [1.0] * 300, 0.95, 0)
    expected = stats.t.interval(0.95, 299, mean(values), stdev(values) / sqrt(300))
    assert found == pytest.approx(expected, abs=0.02)
    # 2,000 draws; a confidence of a half is far narrower, and what never differs has no width.
    half = ratio_interval(values, [1.0] * 300, 0.5, 0)
    assert found is not None
    assert half is not None
    assert half[1] - half[0] < 0.5 * (found[1] - found[0])
    assert ratio_interval([0.5] * 6, [1.0] * 6, 0.95, 0) == (0.5, 0.5)
    assert ratio_interval(values[:3], [1.0] * 3, 0.95, 0) is None
    assert ratio_interval(values, [1.0] * 300, 0.95, 0) == found


def test_needed_units_give_the_power_that_they_say() -> None:
    """Tests with as many units refuse the bound in about four of five simulations."""
    generator = random.Random(3)
    needed = units_needed(0.1, 1.0, 1.0, 0.95)
    assert needed == pytest.approx(((1.959964 + 0.841621) / 0.1) ** 2, rel=2e-3)
    refused = 0
    for _ in range(200):
        drawn = [generator.gauss(0.1, 1.0) for _ in range(needed)]
        refused += abs(mean(drawn)) / (stdev(drawn) / sqrt(needed)) > 1.96
    # Four standard errors of 200 draws.
    assert 0.68 < refused / 200 < 0.92


def test_needed_items_give_the_power_that_they_say() -> None:
    """The score interval of as many items leaves the bound out in about four of five draws."""
    generator = random.Random(4)
    shares = (0.55, 0.12, 0.06, 0.27)
    seen = Answers(550, 120, 60, 270)
    by_difference = difference_items_needed(seen, -0.02, 0.95)
    by_recovery = recovery_items_needed(seen, 0.97, 0.95)
    assert by_difference is not None
    assert by_recovery is not None
    out = [0, 0]
    for _ in range(80):
        answers = _drawn(shares, by_difference, generator)
        low, high = difference_interval(answers, 0.95)
        out[0] += not low <= -0.02 <= high
        found = recovery_interval(_drawn(shares, by_recovery, generator), 0.95)
        assert found is not None
        out[1] += not found[0] <= 0.97 <= found[1]
    for count in out:
        assert 0.62 < count / 80 < 0.98


def test_nothing_would_tell_at_the_bound_itself() -> None:
    """No number of units; and of a single unit nothing is known."""
    assert units_needed(0.0, 1.0, 1.0, 0.95) is None
    assert units_needed(1e-9, 1.0, 1.0, 0.95) is None
    assert ratio_units_needed([1.0], [2.0], 0.4, 0.95) is None
    assert ratio_units_needed([1.0, 1.0], [2.0, 2.0], 0.4, 0.95) == paired.FEWEST_UNITS
    # Nothing differs: what might is known from the test alone.
    needed = difference_items_needed(Answers(60, 0, 0, 40), -0.02, 0.95)
    assert needed is not None
    assert 300 < needed < 500
