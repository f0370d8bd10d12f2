"""Searching the factors that frequencies are divided by: LongRoPE's evolution over LongRoPE2's parameters.

A rotary pair i of frequency f_i turns with f_i / lambda_i. Pairs whose period is longer than what a model was
trained at never saw a whole turn: from the *critical* one on lambda is searched; below it lambda rises to the
critical one's as NTK-aware scaling has it, lambda_i = lambda_c ** (i / c) (LongRoPE2, arXiv 2502.20082,
section 3). Which pair is critical is searched too: in models it comes before the one that theory names.
Critical pair 0 is the space of LongRoPE (arXiv 2402.13753, section 3.2), where every lambda is free. In both,
lambda never falls with i and lies between 1 and 1.25 times the factor of the lengths, in steps of 0.01.

Beside them the multiplier of cosine and sine is searched, which YaRN and LongRoPE set to different values.

Legend: P rotary pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil, exp, floor, pi
from random import Random
from typing import Any

from compressor.rope.methods import longrope_multiplier, ntk, unscaled, yarn
from compressor.rope.positions import read_positions
from compressor.rope.scaled import scaled_config
from compressor.rope.spec import ContextSpec

STEP = 0.01
MOST = 1.25
# Of a searched pair being drawn anew (LongRoPE, table of hyperparameters), and of the multiplier being moved.
_DRAWN = 0.3
_CRITICAL_MOVED = 0.2
# Tries for a child that nobody had before.
_TRIES = 40
# Shares of the theoretical critical pair that are tried: LongRoPE2 finds 30 where theory says 35 (LLaMA 3 8B)
# and 25 where it says 31 (Phi-3 mini).
_CRITICAL_SHARES = (1.0, 0.93, 0.86, 0.79)
# Standard deviations: of the logarithm that a stretch of factors is multiplied by, and of the multiplier.
_STRETCH, _MULTIPLIER = 0.15, 0.02
_MOST_MULTIPLIER_OVER = 0.1
# What a nat over the limit of short texts costs, in nats of long ones.
PENALTY = 10.0


@dataclass(frozen=True)
class Candidate:
    """One set of factors.

    Attributes:
        factors: lambda [P], none below 1, never falling.
        critical: index of the critical pair; 0 where all are free.
        attention_factor: multiplier of cosine and sine.
        origin: where it comes from, for people.
    """

    factors: tuple[float, ...]
    critical: int
    attention_factor: float
    origin: str

    @property
    def content(self) -> tuple[tuple[float, ...], float]:
        """What decides how it scores."""
        return self.factors, self.attention_factor

    def context(self, asked: ContextSpec) -> ContextSpec:
        """What is asked, by these factors."""
        return replace(asked, method="longrope", factors=self.factors, attention_factor=self.attention_factor)


@dataclass(frozen=True)
class Measured:
    """A candidate and what it costs, in nats a token.

    Attributes:
        candidate: the factors.
        long: what is searched for: mean negative log-likelihood of tokens past the original length, or of
            the needles' numbers.
        short: of tokens within the original length.
    """

    candidate: Candidate
    long: float
    short: float

    def fitness(self, short_limit: float) -> float:
        """Smaller is better: ``long``, and a penalty for what ``short`` has over the limit."""
        return self.long + PENALTY * max(0.0, self.short - short_limit)


@dataclass(frozen=True)
class SearchSpace:
    """What is searched.

    Attributes:
        frequencies: of the rotary pairs before scaling, [P], falling, radians a token.
        original_length: tokens that the model was trained at.
        factor: of the lengths.
        yarn: YaRN's lambda [P].
        yarn_attention: YaRN's multiplier of cosine and sine.
        ntk: lambda [P] of NTK-aware scaling.
    """

    frequencies: tuple[float, ...]
    original_length: int
    factor: float
    yarn: tuple[float, ...]
    yarn_attention: float
    ntk: tuple[float, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], context: ContextSpec) -> SearchSpace:
        """The space of a model.

        Args:
            config: contents of its config.json.
            context: what is asked; of method ``longrope``, without factors.

        Raises:
            UserError: LongRoPE does not fit the model, or the lengths do not fit each other.
            CheckpointError: the config has no rotary positions that can be read.
        """
        positions = read_positions(config)
        dims, theta = positions.rotary_dim, positions.theta
        scaled = scaled_config(config, replace(context, factors=(1.0,) * (dims // 2)))
        original = read_positions(scaled.config).original_length
        assert original is not None, "written by the scaling"
        as_yarn = yarn(dims, theta, scaled.factor, original)
        return cls(
            frequencies=unscaled(dims, theta).inverse,
            original_length=original,
            factor=scaled.factor,
            yarn=as_yarn.divisors(theta),
            yarn_attention=as_yarn.multiplier,
            ntk=ntk(dims, theta, scaled.factor).divisors(theta),
        )

    @property
    def most(self) -> float:
        """The largest lambda."""
        return MOST * self.factor

    @property
    def most_attention(self) -> float:
        """The largest multiplier of cosine and sine."""
        return self.yarn_attention + _MOST_MULTIPLIER_OVER

    def criticals(self) -> tuple[int, ...]:
        """Critical pairs that are tried, the theoretical one first."""
        theory = sum(2 * pi / frequency < self.original_length for frequency in self.frequencies)
        theory = min(theory, len(self.frequencies) - 1)
        return tuple(dict.fromkeys(max(1, round(theory * share)) for share in _CRITICAL_SHARES))

    def seeds(self) -> list[Candidate]:
        """Where the search begins, YaRN first: the known methods, and LongRoPE2's guesses."""
        pairs = len(self.frequencies)
        longrope = longrope_multiplier(self.factor, self.original_length)
        seeds = [
            Candidate(self.yarn, 0, self.yarn_attention, "yarn"),
            Candidate(self.yarn, 0, longrope, "yarn, multiplier of longrope"),
            Candidate(self.ntk, 0, self.yarn_attention, "ntk"),
            Candidate((self.factor,) * pairs, 0, 1.0, "linear"),
        ]
        for critical in self.criticals():
            flat = with_critical((self.factor,) * pairs, critical)
            seeds.append(Candidate(flat, critical, self.yarn_attention, f"critical pair {critical}"))
        return list({seed.content: seed for seed in reversed(seeds)}.values())[::-1]


def with_critical(factors: Sequence[float], critical: int) -> tuple[float, ...]:
    """The factors with those below the critical pair put on NTK's curve to its own."""
    last = factors[critical]
    ahead = (min(round(last ** (index / critical), 4), last) for index in range(critical))
    return (*ahead, *factors[critical:])


def children(
    space: SearchSpace,
    parents: Sequence[Candidate],
    tried: Iterable[Candidate],
    *,
    count: int,
    seed: int,
) -> list[Candidate]:
    """``count`` new candidates, half of them mutations and half crossings; fewer where few are left to find.

    Args:
        space: the search.
        parents: the best so far, the best one first.
        tried: none of these, nor two alike, is among the children.
        count: of children.
        seed: decides everything.
    """
    draw = Random(seed)
    had = {candidate.content for candidate in tried}
    made: list[Candidate] = []
    for number in range(count):
        for _ in range(_TRIES):
            if number % 2 and len(parents) > 1:
                one, other = draw.sample(list(parents), 2)
                child = cross(space, one, other, draw)
            else:
                child = mutate(space, draw.choice(parents), draw)
            if child.content not in had:
                had.add(child.content)
                made.append(child)
                break
    return made


def mutate(space: SearchSpace, parent: Candidate, draw: Random) -> Candidate:
    """The parent with some searched factors drawn anew between their neighbours, or a stretch multiplied.

    The first is LongRoPE's mutation. It cannot move a pair between two equal ones, of which the known methods
    have many: hence the second.
    """
    critical = parent.critical
    if critical and draw.random() < _CRITICAL_MOVED:
        critical = draw.choice(space.criticals())
    factors = list(parent.factors)
    if draw.random() < 0.5:
        _draw_anew(space, factors, critical, draw)
    else:
        factors = _stretched(space, factors, critical, draw)
    attention = parent.attention_factor
    if draw.random() < _DRAWN:
        moved = attention + draw.gauss(0, _MULTIPLIER)
        attention = round(min(max(moved, 1.0), space.most_attention), 3)
    return Candidate(_settled(space, factors, critical), critical, attention, "mutation")


def _draw_anew(space: SearchSpace, factors: list[float], critical: int, draw: Random) -> None:
    for index in range(critical, len(factors)):
        if draw.random() >= _DRAWN:
            continue
        least = factors[index - 1] if index > critical else 1.0
        most = factors[index + 1] if index + 1 < len(factors) else space.most
        # In whole steps; what rounding of the quotients adds is far below one.
        first, last = ceil(least / STEP - 1e-9), floor(most / STEP + 1e-9)
        if first <= last:
            factors[index] = round(draw.randint(first, last) * STEP, 2)


def _stretched(space: SearchSpace, factors: Sequence[float], critical: int, draw: Random) -> list[float]:
    """Neighbours multiplied by one number; those beyond them follow as far as they must."""
    first = draw.randrange(critical, len(factors))
    last = draw.randrange(first, len(factors))
    by = exp(draw.gauss(0, _STRETCH))
    changed = list(factors)
    for index in range(first, last + 1):
        changed[index] = min(max(round(factors[index] * by, 2), 1.0), space.most)
    if by > 1:
        return list(accumulate(changed, max))
    return list(accumulate(reversed(changed), min))[::-1]


def cross(space: SearchSpace, one: Candidate, other: Candidate, draw: Random) -> Candidate:
    """A child of two: each searched factor from either, or all of them between both on the way from one to
    the other.
    """
    if draw.random() < 0.5:
        mixed = (
            second if draw.random() < 0.5 else first
            for first, second in zip(one.factors, other.factors, strict=True)
        )
        factors = list(accumulate(mixed, max))
    else:
        share = draw.random()
        factors = [
            min(round(first ** (1 - share) * second**share, 2), space.most)
            for first, second in zip(one.factors, other.factors, strict=True)
        ]
    attention = draw.choice((one.attention_factor, other.attention_factor))
    return Candidate(_settled(space, factors, one.critical), one.critical, attention, "crossing")


def _settled(space: SearchSpace, factors: Sequence[float], critical: int) -> tuple[float, ...]:
    """Below a critical pair NTK's curve, from it on whole steps, which another method's factors are not."""
    if not critical:
        return tuple(factors)
    return with_critical([min(round(value, 2), space.most) for value in factors], critical)


def best_first(measured: Iterable[Measured], short_limit: float) -> list[Measured]:
    """By fitness; of equals the one that was tried first is first."""
    return sorted(measured, key=lambda one: one.fitness(short_limit))


def chosen(measured: Iterable[Measured], short_limit: float) -> Measured | None:
    """The best that keeps the limit of short texts, or None."""
    kept = [one for one in measured if one.short <= short_limit]
    return min(kept, key=lambda one: one.long, default=None)
