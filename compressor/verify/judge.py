"""The verdict on an engine: how far its log-probabilities are from ours, against two yardsticks.

The noise floor is the same distance between two programs that are both right: what arithmetic alone costs.
The effect is how far quantization itself moved the log-probabilities. Noise and a wrong decoding are
independent, so their squares add; what exceeds the noise is held against the effect.

Seen with vLLM 0.32 on CPU (``scripts/serving_matrix.py run``, docs/serving.md): formats that are decoded
rightly exceed the noise by up to 13 percent of the effect, sqrt(difference^2 - floor^2) / effect. What must
be told apart from them is INT4 whose activations vLLM silently rounds to 8 bits on CPUs with AMX:
``VLLM_CPU_INT4_W4A8=1 compress verify out/smollm2-int4 --tokens 1024``, and a test in tests/serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, inf, isfinite, sqrt
from statistics import fmean, pstdev
from typing import Literal

Verdict = Literal["agrees", "disagrees", "undecided"]
Logprobs = Sequence[Sequence[float]]

# Tokens below which a distance says little.
LEAST_TOKENS = 200
# What a wrong decoding may at most look like: this share of the effect.
EFFECT_SHARE = 0.15
# The floor is measured on the source; 16-bit engines round the decoded weights besides.
FLOOR_SLACK = 1.3
# Above this share of the effect the floor hides an engine that is wrong.
LOUD = 0.3
SHIFT_ERRORS = 4.0
# Where no source was measured. SmolLM2-135M in vLLM 0.32 on CPU: 0.0000, 0.0044, 0.0325.
TYPICAL_FLOOR = {"float32": 0.001, "float16": 0.01, "bfloat16": 0.05}


@dataclass(frozen=True)
class Distance:
    """How far two sets of log-probabilities are apart, in nats.

    Attributes:
        mean: absolute difference, over all tokens.
        largest: absolute difference.
        tokens: how many were compared.
        shift: mean of the signed difference: what the text as a whole gained in likelihood.
        shift_error: its standard error.
    """

    mean: float
    largest: float
    tokens: int
    shift: float = 0.0
    shift_error: float = 0.0


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on: one sentence with the numbers."""

    verdict: Verdict
    reason: str


def distance(left: Logprobs, right: Logprobs) -> Distance:
    """How far ``left`` is from ``right``, token by token; NaN and infinities count as infinitely far."""
    apart = [
        a - b if isfinite(a) and isfinite(b) else inf
        for left_window, right_window in zip(left, right, strict=True)
        for a, b in zip(left_window, right_window, strict=True)
    ]
    assert apart, "there is something to compare"
    sizes = [abs(value) for value in apart]
    mean, count = sum(sizes) / len(apart), len(apart)
    if not isfinite(mean):
        return Distance(mean, inf, count, inf, 0.0)
    return Distance(mean, max(sizes), count, fmean(apart), pstdev(apart) / sqrt(count))


def judge(found: Distance, *, floor: float, effect: float | None, rounded: bool = False) -> Judgement:
    """The verdict on ``found``, the distance between the engine and the reference.

    Args:
        found: engine against reference, both on the checkpoint.
        floor: mean distance that two right programs have; measured, or a typical one.
        effect: checkpoint against source, both by the reference, mean; None where there is no source.
        rounded: both round activations, and ``floor`` is that of this very checkpoint. Where it is near the
            effect, as it mostly is, it hides all but gross faults, which also shift the likelihood of the
            text: these are told, and the rest is undecided.
    """
    against = f"noise floor {floor:.4f}" + (f", effect of quantization {effect:.4f}" if effect else "")
    numbers = f"mean difference {found.mean:.4f} nats over {found.tokens} tokens ({against})"
    if found.tokens < LEAST_TOKENS:
        return Judgement("undecided", f"{found.tokens} tokens are too few: use {LEAST_TOKENS}")
    allowed = hypot(FLOOR_SLACK * floor, EFFECT_SHARE * effect) if effect else 2 * floor
    if not found.mean <= allowed:
        return Judgement("disagrees", f"{numbers}: more than the {allowed:.4f} allowed")
    if rounded:
        drift = SHIFT_ERRORS * found.shift_error + EFFECT_SHARE * (effect or 0.0)
        if abs(found.shift) > drift:
            return Judgement("disagrees", f"{numbers}: the text's likelihood shifts by {found.shift:+.4f}")
    # Without a source nobody knows how far the noise of rounding is from the effect.
    if floor > LOUD * effect if effect else rounded:
        hidden = "all but gross faults, of which none shows" if rounded else "the effect"
        return Judgement("undecided", f"{numbers}: the noise hides {hidden}")
    return Judgement("agrees", numbers)
