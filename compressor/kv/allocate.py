"""Which format each layer gets under a budget of bytes: solved exactly, whatever limits the choice.

A multiple-choice knapsack: one candidate for each layer, the sum of bytes within the budget, the sum of costs
the least. It is solved by dynamic programming over bytes in units of what all sizes have in common, which is
at least the number of KV heads, so that its tables stay small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, inf, isfinite

import numpy as np

from compressor.errors import UserError

# Steps of the table, over all layers; 80 layers at 128K steps each are 80 MB.
_MOST_CELLS = 2**28


@dataclass(frozen=True)
class Candidate:
    """One way to store one layer.

    Attributes:
        name: of the format.
        token_bytes: of one token in all of the layer's KV heads.
        cost: what it does to the loss; a sum over layers is compared, so any unit will do.
    """

    name: str
    token_bytes: int
    cost: float


@dataclass(frozen=True)
class Allocation:
    """The best choice.

    Attributes:
        chosen: layer -> its candidate.
        token_bytes: of one token in all layers.
        cost: sum of the candidates' costs.
    """

    chosen: Mapping[int, Candidate]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return sum(candidate.token_bytes for candidate in self.chosen.values())

    @property
    def cost(self) -> float:
        """Sum over layers."""
        return sum(candidate.cost for candidate in self.chosen.values())


@dataclass(frozen=True)
class ServableAllocation:
    """One engine format, and the layers that it skips.

    Attributes:
        format: for every layer that is not skipped.
        skipped: layers kept in 16 bit, the engine's forced ones included.
        allocation: the same, layer by layer.
    """

    format: str
    skipped: tuple[int, ...]
    allocation: Allocation


def allocate(options: Mapping[int, Sequence[Candidate]], budget_bytes: int) -> Allocation:
    """One candidate for each layer: the least cost within the budget, and of equals the fewest bytes.

    Args:
        options: layer -> its candidates; a layer that must stay as it is has one.
        budget_bytes: for one token in all layers.

    Raises:
        UserError: even the smallest candidates take more.
    """
    layers = sorted(options)
    least = sum(min(candidate.token_bytes for candidate in options[layer]) for layer in layers)
    if least > budget_bytes:
        raise UserError(
            f"the KV budget of {budget_bytes:,} bytes a token is below the smallest choice, {least:,} bytes",
            fix="raise the budget, or allow smaller formats",
        )
    sizes = [candidate.token_bytes for layer in layers for candidate in options[layer]]
    assert all(isfinite(candidate.cost) for layer in layers for candidate in options[layer])
    unit = gcd(*sizes) or 1
    most = sum(max(candidate.token_bytes for candidate in options[layer]) for layer in layers)
    steps = min(budget_bytes, most) // unit
    assert (steps + 1) * len(layers) <= _MOST_CELLS, "sizes have too little in common for an exact choice"
    chosen = _solve([options[layer] for layer in layers], unit, steps)
    return Allocation(dict(zip(layers, chosen, strict=True)))


def allocate_servable(
    options: Mapping[int, Mapping[str, Candidate]],
    plain: Mapping[int, Candidate],
    forced: Mapping[str, Iterable[int]],
    budget_bytes: int,
) -> ServableAllocation:
    """The best single format with a list of skipped layers, for an engine that has one format at a time.

    Args:
        options: layer -> format -> what it costs there; formats that miss a layer are left out.
        plain: layer -> the layer in 16 bit.
        forced: format -> layers that the engine keeps in 16 bit whatever it is told; none where not listed.
        budget_bytes: for one token in all layers.

    Raises:
        UserError: no format fits the budget.
    """
    names = sorted({name for found in options.values() for name in found})
    best: ServableAllocation | None = None
    for name in names:
        if any(name not in found for found in options.values()):
            continue
        kept = set(forced.get(name, ()))
        choices = {
            layer: [plain[layer]] if layer in kept else [found[name], plain[layer]]
            for layer, found in options.items()
        }
        try:
            allocation = allocate(choices, budget_bytes)
        except UserError:
            continue  # another format may be smaller
        skipped = tuple(sorted(layer for layer, c in allocation.chosen.items() if c is plain[layer]))
        if best is None or _rank(allocation) < _rank(best.allocation):
            best = ServableAllocation(name, skipped, allocation)
    if best is None:
        raise UserError(
            f"no servable KV format fits the budget of {budget_bytes:,} bytes a token",
            fix="raise the budget, or choose tier own or research",
        )
    return best


def _rank(allocation: Allocation) -> tuple[float, int]:
    return allocation.cost, allocation.token_bytes


def _solve(groups: Sequence[Sequence[Candidate]], unit: int, steps: int) -> list[Candidate]:
    """The best candidate of each group; the sum of bytes is at most ``steps * unit``."""
    # least_S[s]: the least cost of the groups so far with exactly s units.
    least_S = np.full(steps + 1, inf)
    least_S[0] = 0.0
    picks = []
    for group in groups:
        next_S = np.full(steps + 1, inf)
        pick_S = np.full(steps + 1, -1, dtype=np.int16)
        for number, candidate in enumerate(group):
            size = candidate.token_bytes // unit
            if size > steps:
                continue
            reached = least_S[: steps + 1 - size] + candidate.cost
            better = reached < next_S[size:]
            next_S[size:][better] = reached[better]
            pick_S[size:][better] = number
        picks.append(pick_S)
        least_S = next_S
    at = int(np.argmin(least_S))  # the first of equals: the fewest bytes
    chosen = []
    for group, pick_S in zip(reversed(groups), reversed(picks), strict=True):
        candidate = group[int(pick_S[at])]
        chosen.append(candidate)
        at -= candidate.token_bytes // unit
    return chosen[::-1]
