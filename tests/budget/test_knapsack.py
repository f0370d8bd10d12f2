"""The exact choice against brute force, and what a random mix must keep to."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compressor.budget.knapsack import Option, best_mix, hull, mix_of, random_mix, uniform_mix
from compressor.errors import UserError

_OPTION = st.builds(
    Option,
    st.just("x"),
    st.integers(0, 60),
    # Coarse costs, so that equals come up.
    st.integers(0, 12).map(lambda n: n / 4),
)
_GROUPS = st.lists(st.lists(_OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def brute_force(groups: list[list[Option]], budget: int) -> tuple[float, int] | None:
    """(cost, bytes) of the best of all mixes; None where none fits."""
    mixes = [mix_of(groups, chosen) for chosen in product(*(range(len(of)) for of in groups))]
    return min(((mix.cost, mix.nbytes) for mix in mixes if mix.nbytes <= budget), default=None)


@settings(max_examples=400, deadline=None)
@given(_GROUPS, st.integers(0, 200))
def test_best_of_all_mixes(groups: list[list[Option]], budget: int) -> None:
    """As cheap, and of equals as small, as the best of all mixes."""
    expected = brute_force(groups, budget)
    if expected is None:
        with pytest.raises(UserError, match="budget"):
            best_mix(groups, budget)
        return
    found = best_mix(groups, budget)
    assert (found.cost, found.nbytes) == expected
    assert mix_of(groups, found.chosen) == found


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 10**9), st.floats(-12, 12)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    )
)
@example([[(1, 9.0), (2, -9.0)], [(1, -9.0), (1, 7.0), (3, -11.0)], [(1, 12.0), (5, -12.0)]])
def test_costs_of_all_sizes(drawn: list[list[tuple[int, float]]]) -> None:
    """A matrix that would ruin the model beside one that hardly matters: sums round, the best is found."""
    groups = [[Option("x", nbytes, 10**power) for nbytes, power in of] for of in drawn]
    budget = sum(max(option.nbytes for option in of) for of in groups)
    for room in (budget, 2 * budget // 3):
        if (expected := brute_force(groups, room)) is not None:
            assert best_mix(groups, room).cost == pytest.approx(expected[0], rel=1e-9)


def test_beats_the_greedy_choice() -> None:
    """What is cheapest by the byte is not taken where something else fits better."""
    # By cost a byte the small steps come first, but the large one is worth more than all of them.
    small = [[Option("a", 0, 1.0), Option("b", 6, 0.3)], [Option("a", 0, 1.0), Option("b", 6, 0.3)]]
    large = [Option("a", 0, 1.5), Option("b", 10, 0.4)]
    assert best_mix([*small, large], 10).chosen == (0, 0, 1)


def test_many_layers_of_few_shapes() -> None:
    """Exact at the size of a large model, in moments."""
    # 400 groups whose sizes have only 4 in common: a table over bytes would take gigabytes.
    groups = [
        [
            Option("nvfp4a16", 4_423_684 + 12 * (n % 3), 1 + (n * 37 % 101) / 7),
            Option("int8", 7_900_160, 0.02),
            Option("copy", 15_728_640, 0.0),
        ]
        for n in range(400)
    ]
    low = sum(options[0].nbytes for options in groups)
    mix = best_mix(groups, int(1.06 * low))
    assert mix.nbytes <= int(1.06 * low)
    raised = {n for n, chosen in enumerate(mix.chosen) if chosen}
    # All are as large, so those that cost most are raised.
    least_raised = min(groups[n][0].cost for n in raised)
    assert least_raised >= max(groups[n][0].cost for n in range(400) if n not in raised) - 1e-9


@given(_GROUPS, st.integers(0, 200), st.integers(0, 5))
def test_random_mix_fills_the_budget(groups: list[list[Option]], budget: int, seed: int) -> None:
    """It stays within the budget and leaves no room that any group could use."""
    if brute_force(groups, budget) is None:
        return
    mix = random_mix(groups, budget, seed)
    assert mix == mix_of(groups, mix.chosen)
    assert mix.nbytes <= budget
    for options, chosen in zip(groups, mix.chosen, strict=True):
        larger = [o.nbytes - options[chosen].nbytes for o in options if o.nbytes > options[chosen].nbytes]
        assert all(more > budget - mix.nbytes for more in larger)
    assert mix == random_mix(groups, budget, seed)


def test_uniform_mix() -> None:
    """One scheme everywhere, or nothing."""
    groups = [[Option("a", 1, 1.0), Option("b", 2, 0.5)], [Option("b", 3, 0.25)]]
    assert uniform_mix(groups, "b") == mix_of(groups, (1, 0))
    assert uniform_mix(groups, "a") is None


def test_hull_leaves_out_what_mixing_beats() -> None:
    """Only corners of the lower convex hull stay."""
    options = [Option("a", 0, 4.0), Option("b", 1, 3.9), Option("c", 2, 1.0), Option("d", 3, 1.0)]
    assert [option.name for option in hull(options)] == ["a", "c"]
