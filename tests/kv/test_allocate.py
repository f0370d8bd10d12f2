"""The knapsack against brute force, and the engine's limits."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from compressor.errors import UserError
from compressor.kv.allocate import Allocation, Candidate, allocate, allocate_servable

SIZES = (54, 62, 70, 100, 136, 256)


def random_options(random: Random, layers: int) -> dict[int, list[Candidate]]:
    """Layers with some of the sizes; equal costs are frequent."""
    return {
        3 * layer + 1: [
            Candidate(str(size), 3 * size, random.choice([random.random(), 0.25]))
            for size in random.sample(SIZES, random.randint(1, 4))
        ]
        for layer in range(layers)
    }


def brute_force(options: dict[int, list[Candidate]], budget_bytes: int) -> tuple[float, int] | None:
    """The least cost, and of equals the fewest bytes; None where nothing fits."""
    found = [
        (sum(c.cost for c in chosen), sum(c.token_bytes for c in chosen))
        for chosen in product(*options.values())
        if sum(c.token_bytes for c in chosen) <= budget_bytes
    ]
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(60))
def test_as_brute_force(seed: int) -> None:
    """The cost is the least, whatever the sizes."""
    random = Random(seed)
    options = random_options(random, random.randint(1, 6))
    budget = random.randint(150, 900) * len(options)
    best = brute_force(options, budget)
    if best is None:
        with pytest.raises(UserError, match="below the smallest choice"):
            allocate(options, budget)
        return
    found = allocate(options, budget)
    assert set(found.chosen) == set(options)
    assert all(found.chosen[layer] in options[layer] for layer in options)
    assert found.token_bytes <= budget
    assert found.cost == pytest.approx(best[0], abs=1e-12)  # sums in another order
    # Of equal costs the fewest bytes; brute force may call two sums of other order unequal.
    if best[0] == found.cost:
        assert found.token_bytes == best[1]


def test_more_budget_never_costs_more() -> None:
    """A larger budget allows whatever a smaller one did."""
    options = random_options(Random(5), 12)
    costs = [allocate(options, budget).cost for budget in range(12 * 3 * 256, 12 * 3 * 100, -97)]
    assert costs == sorted(costs)


@pytest.mark.parametrize("seed", range(20))
def test_servable_as_brute_force(seed: int) -> None:
    """Every format with every list of skipped layers was tried."""
    random = Random(seed)
    layers, formats = range(6), {"a": 54, "b": 70, "c": 100}
    options = {
        layer: {name: Candidate(name, size, random.random() / size) for name, size in formats.items()}
        for layer in layers
    }
    plain = {layer: Candidate("bf16", 256, 0.0) for layer in layers}
    forced = {"a": (0, 5), "b": (0, 5)}
    budget = random.randint(700, 1300)
    costs = []
    for name, skips in product(formats, product([False, True], repeat=6)):
        if not all(skips[layer] for layer in forced.get(name, ())):
            continue
        chosen = [plain[layer] if skip else options[layer][name] for layer, skip in enumerate(skips)]
        if sum(c.token_bytes for c in chosen) <= budget:
            costs.append(sum(c.cost for c in chosen))
    found = allocate_servable(options, plain, forced, budget)
    assert found.allocation.cost == pytest.approx(min(costs), abs=1e-12)
    assert found.allocation.token_bytes <= budget
    assert set(forced.get(found.format, ())) <= set(found.skipped)
    names = {c.name for layer, c in found.allocation.chosen.items() if layer not in found.skipped}
    assert names <= {found.format}


def test_budget_too_small_is_told() -> None:
    """Forced layers count in full."""
    options = {0: {"a": Candidate("a", 54, 1.0)}}
    plain = {0: Candidate("bf16", 256, 0.0)}
    with pytest.raises(UserError, match="no servable KV format fits the budget of 53 bytes"):
        allocate_servable(options, plain, {}, 53)
    with pytest.raises(UserError, match="no servable"):
        allocate_servable(options, plain, {"a": [0]}, 255)
    assert allocate_servable(options, plain, {}, 255).format == "a"


def test_empty() -> None:
    """A model without full attention has nothing to choose."""
    assert allocate({}, 10) == Allocation({})
