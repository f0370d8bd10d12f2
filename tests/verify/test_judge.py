"""The verdict rests on distances alone: who is near enough, who is not, and when nobody can tell."""

from __future__ import annotations

import math

import pytest

from compressor.verify.judge import Distance, distance, judge


def test_distance_is_the_mean_and_the_largest() -> None:
    """Over all tokens of all windows, whatever their lengths."""
    found = distance([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]])
    assert (found.mean, found.largest, found.tokens) == (0.5, 1.0, 3)
    assert found.shift == pytest.approx(-0.5 / 3)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_nan_is_infinitely_far(odd: float) -> None:
    """A comparison with NaN is false: it must not pass for a small difference."""
    found = distance([[odd]], [[-1.0]])
    assert found.mean == math.inf
    assert judge(Distance(math.nan, 0.0, 500), floor=0.1, effect=1.0).verdict == "disagrees"


@pytest.mark.parametrize(
    ("mean", "floor", "effect", "verdict"),
    [
        # float32: no noise to speak of
        (0.0002, 0.0001, 0.3, "agrees"),
        (0.044, 0.0001, 0.3, "agrees"),
        (0.046, 0.0001, 0.3, "disagrees"),
        # measured: INT4 in bfloat16 and float16, and with activations silently rounded to 8 bits
        (0.0384, 0.0325, 0.7072, "agrees"),
        (0.0049, 0.0044, 0.7072, "agrees"),
        (0.2083, 0.0325, 0.7072, "disagrees"),
        # measured: FP8_BLOCK against weights only, and against rounded activations
        (0.0327, 0.0325, 0.0608, "undecided"),
        (0.0531, 0.0325, 0.0608, "disagrees"),
        # measured: W8A8, where two references of different precision are as far apart
        (0.2030, 0.1988, 0.1840, "undecided"),
        (0.0015, 0.001, None, "agrees"),
        (0.01, 0.001, None, "disagrees"),
    ],
)
def test_verdicts(mean: float, floor: float, effect: float | None, verdict: str) -> None:
    """Noise and 15 percent of the effect are allowed; noise near the effect hides mistakes."""
    assert judge(Distance(mean, mean, 510), floor=floor, effect=effect).verdict == verdict


def test_few_tokens_prove_nothing() -> None:
    """Even if they are all equal."""
    judged = judge(Distance(0.0, 0.0, 199), floor=0.0, effect=0.3)
    assert judged.verdict == "undecided"
    assert "200" in judged.reason


@pytest.mark.parametrize(
    ("mean", "shift", "verdict"),
    [(0.2030, 0.01, "undecided"), (0.2030, 0.12, "disagrees"), (0.29, 0.0, "disagrees")],
)
def test_rounded_activations(mean: float, shift: float, verdict: str) -> None:
    """Measured for W8A8: two right programs are 0.1988 apart; a gross fault shifts the likelihood too.

    What noise of the effect's size cannot tell is not called agreement: who insists on the engine gets none.
    """
    found = Distance(mean, 1.6, 1020, shift, 0.009)
    judged = judge(found, floor=0.1988, effect=0.1840, rounded=True)
    assert judged.verdict == verdict
    assert judged.verdict == "disagrees" or "gross" in judged.reason
    assert judge(found, floor=0.1988, effect=None, rounded=True).verdict != "agrees"


def test_rounded_activations_far_below_the_effect_agree() -> None:
    """Noise that hides nothing leaves a plain verdict, on the reference that rounds as well."""
    found = Distance(0.05, 0.4, 510, 0.001, 0.002)
    assert judge(found, floor=0.05, effect=0.5, rounded=True).verdict == "agrees"
