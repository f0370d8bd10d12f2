"""Inverse frequencies of rotary positions, as each scaling method makes them; this imports no torch.

Everything is computed in double precision; engines compute in fp32 and differ by its rounding alone
(tests/rope/test_methods.py, against transformers 5.17 and vLLM 0.32).

Legend: d rotary_dim, i = 0 .. d/2 - 1, f_i = theta^(-2i/d), s factor, L original length, n tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Where YaRN's ramp begins and ends, in turns within the original length (2309.00071 section 3.2).
BETA_FAST = 32.0
BETA_SLOW = 1.0
# Llama 3.1's own (transformers 5.17 modeling_rope_utils.py, _compute_llama3_parameters).
LOW_FREQ_FACTOR = 1.0
HIGH_FREQ_FACTOR = 4.0
# Added to a ramp of no width (transformers 5.17 modeling_rope_utils.py, linear_ramp_factor).
_NARROW = 0.001


@dataclass(frozen=True)
class Frequencies:
    """What turns a model's queries and keys.

    Attributes:
        inverse: inverse frequencies in radians per token, one for each of the rotary_dim / 2 pairs.
        multiplier: of cosines and sines.
    """

    inverse: tuple[float, ...]
    multiplier: float = 1.0

    def divisors(self, theta: float) -> tuple[float, ...]:
        """By what each frequency is divided, against unscaled ones of that ``theta``: LongRoPE's lambda."""
        plain = unscaled(2 * len(self.inverse), theta).inverse
        return tuple(before / after for before, after in zip(plain, self.inverse, strict=True))


def unscaled(rotary_dim: int, theta: float) -> Frequencies:
    """f_i (RoFormer, 2104.09864 section 3.2.2)."""
    assert rotary_dim >= 2
    assert rotary_dim % 2 == 0
    return Frequencies(tuple(theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)))


def linear(rotary_dim: int, theta: float, factor: float) -> Frequencies:
    """f_i / s: position interpolation (2306.15595 section 2.3)."""
    return Frequencies(tuple(inverse / factor for inverse in unscaled(rotary_dim, theta).inverse))


def ntk_theta(rotary_dim: int, theta: float, factor: float) -> float:
    """theta s^(d/(d-2)): the lowest frequency is divided by s, the highest kept (2309.00071 section 3.1)."""
    assert rotary_dim > 2
    return float(theta * factor ** (rotary_dim / (rotary_dim - 2)))


def ntk(rotary_dim: int, theta: float, factor: float) -> Frequencies:
    """Those of the raised ``ntk_theta``, unscaled: engines have no type of that name."""
    return unscaled(rotary_dim, ntk_theta(rotary_dim, theta, factor))


def dynamic(rotary_dim: int, theta: float, factor: float, original_length: int, tokens: int) -> Frequencies:
    """NTK with a factor that grows with the text: s n / L - (s - 1), n at least L (2309.00071 section 3.3;
    transformers 5.17 modeling_rope_utils.py, ``_compute_dynamic_ntk_parameters``, where L is the config's
    ``max_position_embeddings``).
    """
    grown = factor * max(tokens, original_length) / original_length - (factor - 1)
    return ntk(rotary_dim, theta, grown)


def yarn_multiplier(factor: float, mscale: float = 1.0) -> float:
    """0.1 m ln s + 1, or 1 for s <= 1 (2309.00071 section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_ramp(
    rotary_dim: int,
    theta: float,
    original_length: int,
    beta_fast: float = BETA_FAST,
    beta_slow: float = BETA_SLOW,
    *,
    truncate: bool = True,
) -> tuple[float, ...]:
    """How far each frequency is interpolated: 0 is kept, 1 is divided by the factor (2309.00071 section 3.2).

    The ramp runs over the index i, from where a pair turns ``beta_fast`` times within L to where it turns
    ``beta_slow`` times; both ends are rounded outwards unless ``truncate`` is false (gpt-oss).
    """

    def index(turns: float) -> float:
        return rotary_dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low or _NARROW
    return tuple(min(max((i - low) / width, 0.0), 1.0) for i in range(rotary_dim // 2))


def yarn(
    rotary_dim: int,
    theta: float,
    factor: float,
    original_length: int,
    *,
    beta_fast: float = BETA_FAST,
    beta_slow: float = BETA_SLOW,
    truncate: bool = True,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
) -> Frequencies:
    """(1 - r_i) f_i + r_i f_i / s with the ramp r (2309.00071; transformers 5.17 modeling_rope_utils.py
    ``_compute_yarn_parameters``, vLLM 0.32 rotary_embedding/yarn_scaling_rope.py).

    The multiplier is ``attention_factor``, else the ratio of both ``mscale``, else 0.1 ln s + 1.
    """
    ramp = yarn_ramp(rotary_dim, theta, original_length, beta_fast, beta_slow, truncate=truncate)
    plain = unscaled(rotary_dim, theta).inverse
    inverse = tuple(f * (1 - r) + f / factor * r for f, r in zip(plain, ramp, strict=True))
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = yarn_multiplier(factor, mscale) / yarn_multiplier(factor, mscale_all_dim)
    return Frequencies(inverse, yarn_multiplier(factor) if attention_factor is None else attention_factor)


def longrope_multiplier(factor: float, original_length: int) -> float:
    """sqrt(1 + ln s / ln L), or 1 for s <= 1 (2402.13753; transformers 5.17 ``_compute_longrope_parameters``,
    vLLM 0.32 rotary_embedding/phi3_long_rope_scaled_rope.py).
    """
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0


def longrope(theta: float, factors: Sequence[float], multiplier: float) -> Frequencies:
    """f_i / lambda_i (2402.13753 section 3.1).

    Args:
        theta: base of the unscaled frequencies.
        factors: lambda, one for each of the rotary_dim / 2 frequencies.
        multiplier: see ``longrope_multiplier``.
    """
    plain = unscaled(2 * len(factors), theta).inverse
    return Frequencies(tuple(f / by for f, by in zip(plain, factors, strict=True)), multiplier)


def llama3(
    rotary_dim: int,
    theta: float,
    factor: float,
    original_length: int,
    *,
    low: float = LOW_FREQ_FACTOR,
    high: float = HIGH_FREQ_FACTOR,
) -> Frequencies:
    """f_i / s where a wavelength exceeds L / low, f_i below L / high, a blend between (transformers 5.17
    ``_compute_llama3_parameters``, vLLM 0.32 rotary_embedding/llama3_rope.py).
    """
    assert high > low
    found = []
    for f in unscaled(rotary_dim, theta).inverse:
        turns = original_length * f / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append((1 - kept) * f / factor + kept * f)
    return Frequencies(tuple(found))


def of_parameters(parameters: Mapping[str, Any], rotary_dim: int, length: int, tokens: int) -> Frequencies:
    """The frequencies that a well-formed ``rope_parameters`` describes, as transformers 5.17 reads it.

    Args:
        parameters: those of one kind of layer; ``rope/checked.py`` tells what is wrong with them.
        rotary_dim: dimensions that are turned.
        length: the config's ``max_position_embeddings``.
        tokens: in the text, for methods that depend on it.

    Raises:
        KeyError: a field is missing, or the type is unknown.
    """
    theta = float(parameters["rope_theta"])
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return unscaled(rotary_dim, theta)
    if kind == "longrope":
        original = int(parameters["original_max_position_embeddings"])
        multiplier = parameters.get("attention_factor")
        if multiplier is None:
            multiplier = longrope_multiplier(parameters.get("factor") or length / original, original)
        which = "long_factor" if tokens > original else "short_factor"
        return longrope(theta, parameters[which], float(multiplier))
    factor = float(parameters["factor"])
    if kind == "linear":
        return linear(rotary_dim, theta, factor)
    if kind == "dynamic":
        return dynamic(rotary_dim, theta, factor, length, tokens)
    original = int(parameters["original_max_position_embeddings"])
    if kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        return llama3(rotary_dim, theta, factor, original, low=float(low), high=float(high))
    if kind != "yarn":
        raise KeyError(kind)
    return yarn(
        rotary_dim,
        theta,
        factor,
        original,
        beta_fast=parameters.get("beta_fast") or BETA_FAST,
        beta_slow=parameters.get("beta_slow") or BETA_SLOW,
        truncate=parameters.get("truncate", True),
        attention_factor=parameters.get("attention_factor"),
        mscale=parameters.get("mscale"),
        mscale_all_dim=parameters.get("mscale_all_dim"),
    )
