"""Which of several ways each group of tensors gets under a budget of bytes: the best choice, exactly.

A multiple-choice knapsack: one option of each group, bytes within the budget, the sum of costs the least.
Groups are taken in turn, and of the partial choices those are kept that no other one beats in bytes and cost
(Nemhauser and Ullmann 1969) and that could still be the best: a lower bound on what is left, the linear
relaxation (Kellerer, Pferschy and Pisinger 2004, section 11.2), is below a choice already found. Sizes need
nothing in common, unlike in a table over bytes.

Legend: S partial choices, K increments of the relaxation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from random import Random

import numpy as np
from numpy.typing import NDArray

from compressor.errors import UserError

# Room for the rounding of sums, relative to the largest of them: choices this close to the best one found are
# kept.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Option:
    """One way to store a group.

    Attributes:
        name: of the scheme, as recipes spell it.
        nbytes: of the group's tensors, scales included.
        cost: what it does to the loss; sums over groups are compared, so any unit will do.
    """

    name: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Mix:
    """One option of each group; ``chosen`` are their numbers."""

    chosen: tuple[int, ...]
    nbytes: int
    cost: float


def best_mix(groups: Sequence[Sequence[Option]], budget_bytes: int) -> Mix:
    """The mix of least cost within the budget, and of equals one of the fewest bytes.

    Raises:
        UserError: even the smallest options take more.
    """
    assert all(isfinite(option.cost) for options in groups for option in options)
    check_budget(groups, budget_bytes)
    bounds = [_Relaxed(groups[place:]) for place in range(len(groups) + 1)]
    most = bounds[0].rounded_cost(budget_bytes)
    most += _ROUNDING * max(1.0, abs(most), bounds[0].most_cost)
    nbytes_S, cost_S = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for place, options in enumerate(groups):
        sizes = np.array([option.nbytes for option in options], np.int64)
        costs = np.array([option.cost for option in options])
        all_bytes_S = (nbytes_S[:, None] + sizes).ravel()
        all_cost_S = (cost_S[:, None] + costs).ravel()
        left = bounds[place + 1]
        room_S = budget_bytes - all_bytes_S
        alive_S = np.flatnonzero((room_S >= left.least_bytes) & (all_cost_S + left.cost(room_S) <= most))
        order_S = alive_S[np.lexsort((all_cost_S[alive_S], all_bytes_S[alive_S]))]
        # Of more bytes, only what costs less than everything before it.
        before_S = np.minimum.accumulate(np.concatenate([[np.inf], all_cost_S[order_S][:-1]]))
        kept_S = order_S[all_cost_S[order_S] < before_S]
        nbytes_S, cost_S = all_bytes_S[kept_S], all_cost_S[kept_S]
        trail.append((kept_S // len(options), kept_S % len(options)))
    # Sorted by bytes, and costs fall: the last one costs the least.
    at, chosen = len(cost_S) - 1, []
    for parent_S, option_S in reversed(trail):
        chosen.append(int(option_S[at]))
        at = int(parent_S[at])
    return mix_of(groups, chosen[::-1])


def smallest_mix(groups: Sequence[Sequence[Option]], most_cost: float) -> Mix:
    """The smallest of the best mixes that cost no more; the most exact one where all cost more."""
    low = sum(min(option.nbytes for option in options) for options in groups)
    found = best_mix(groups, sum(max(option.nbytes for option in options) for options in groups))
    high = found.nbytes
    while low < high:
        middle = (low + high) // 2
        mix = best_mix(groups, middle)
        if mix.cost <= most_cost:
            found, high = mix, mix.nbytes if mix.nbytes < high else middle
        else:
            low = middle + 1
    return found


def check_budget(groups: Sequence[Sequence[Option]], budget_bytes: int) -> None:
    """Refuses a budget below the smallest choice.

    Raises:
        UserError: with both numbers.
    """
    least = sum(min(option.nbytes for option in options) for options in groups)
    if least > budget_bytes:
        raise UserError(
            f"the budget leaves {budget_bytes:,} bytes, and the smallest candidates take {least:,}",
            where="weights.budget",
            fix="raise the budget, or add a smaller candidate",
        )


def mix_of(groups: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Mix:
    """The mix of these options, added up."""
    options = [of[number] for of, number in zip(groups, chosen, strict=True)]
    return Mix(tuple(chosen), sum(o.nbytes for o in options), sum(o.cost for o in options))


def random_mix(groups: Sequence[Sequence[Option]], budget_bytes: int, seed: int) -> Mix:
    """A mix at the budget that looks at no costs: random groups get random larger options while they fit.

    In the end no group can be given more: it takes the budget as far as sizes allow.

    Raises:
        UserError: as ``best_mix``.
    """
    check_budget(groups, budget_bytes)
    random = Random(seed)
    chosen = [min(enumerate(of), key=lambda entry: entry[1].nbytes)[0] for of in groups]
    room = budget_bytes - mix_of(groups, chosen).nbytes
    open_groups = list(range(len(groups)))
    while open_groups:
        group = open_groups[random.randrange(len(open_groups))]
        options, now = groups[group], groups[group][chosen[group]].nbytes
        larger = [n for n, option in enumerate(options) if now < option.nbytes <= now + room]
        if not larger:
            open_groups.remove(group)
            continue
        chosen[group] = larger[random.randrange(len(larger))]
        room -= options[chosen[group]].nbytes - now
    return mix_of(groups, chosen)


def uniform_mix(groups: Sequence[Sequence[Option]], name: str) -> Mix | None:
    """The mix with one option everywhere; None where some group does not have it."""
    chosen = []
    for options in groups:
        number = next((n for n, option in enumerate(options) if option.name == name), None)
        if number is None:
            return None
        chosen.append(number)
    return mix_of(groups, chosen)


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of cost over bytes, fewest bytes first."""
    found: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.cost)):
        if found and option.cost >= found[-1].cost:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) >= _slope(found[-2], option):
            found.pop()
        found.append(option)
    return found


def _slope(first: Option, second: Option) -> float:
    """Cost by byte between two options; the second is larger."""
    return (second.cost - first.cost) / (second.nbytes - first.nbytes)


class _Relaxed:
    """The relaxation of some groups: options may be mixed within a group.

    Attributes:
        least_bytes: of their smallest options.
        most_cost: of these, which no choice on the hulls exceeds.
    """

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        hulls = [hull(options) for options in groups]
        self.least_bytes = sum(options[0].nbytes for options in hulls)
        self.most_cost = sum(options[0].cost for options in hulls)
        steps = sorted(
            (_slope(low, high), high.nbytes - low.nbytes, high.cost - low.cost)
            for options in hulls
            for low, high in pairwise(options)
        )
        self._steps = [(nbytes, cost) for _, nbytes, cost in steps]
        self._bytes_K = self.least_bytes + np.cumsum([0, *(nbytes for nbytes, _ in self._steps)]).astype(
            float
        )
        self._cost_K = self.most_cost + np.cumsum([0.0, *(cost for _, cost in self._steps)])

    def cost(self, room_S: NDArray[np.int64]) -> NDArray[np.float64]:
        """A lower bound on the groups' cost in so many bytes, which hold the smallest options at least."""
        bound_S: NDArray[np.float64] = np.interp(room_S.astype(float), self._bytes_K, self._cost_K)
        return bound_S

    def rounded_cost(self, room: int) -> float:
        """What the relaxed choice costs when every step that does not fit whole is left out: can be had."""
        room, cost = room - self.least_bytes, self.most_cost
        for nbytes, step in self._steps:
            if nbytes > room:
                # A later step of the same group would rest on this one.
                break
            room, cost = room - nbytes, cost + step
        return cost
