"""The evolution of factors, on objectives that can be computed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import ceil, log, pi
from random import Random

import pytest

from compressor.errors import UserError
from compressor.rope.scaled import scaled_config
from compressor.rope.search import (
    MOST,
    Candidate,
    Measured,
    SearchSpace,
    best_first,
    children,
    chosen,
    cross,
    mutate,
    with_critical,
)
from compressor.rope.spec import ContextSpec

PAIRS, THETA, LENGTH = 32, 1e5, 8192


def space_of(factor: float = 4.0) -> SearchSpace:
    """SmolLM2's frequencies; YaRN's ramp between pairs 10 and 20."""
    frequencies = tuple(THETA ** (-index / PAIRS) for index in range(PAIRS))
    ramp = [min(max((index - 10) / 10, 0), 1) for index in range(PAIRS)]
    yarn = tuple(1 / ((1 - share) + share / factor) for share in ramp)
    ntk = tuple(factor ** (index / (PAIRS - 1)) for index in range(PAIRS))
    return SearchSpace(frequencies, LENGTH, factor, yarn, 0.1 * log(factor) + 1, ntk)


def evolve(space: SearchSpace, cost: Callable[[Candidate], float], seed: int = 0) -> list[Measured]:
    """What the stage does, with a cost that is known."""
    measured = [Measured(candidate, cost(candidate), 0.0) for candidate in space.seeds()]
    for generation in range(30):
        parents = [one.candidate for one in best_first(measured, 0.0)[:8]]
        had = [one.candidate for one in measured]
        new = children(space, parents, had, count=8, seed=seed * 1000 + generation)
        measured += [Measured(candidate, cost(candidate), 0.0) for candidate in new]
    return measured


def test_it_finds_an_optimum_that_no_seed_is_near() -> None:
    """From the seeds, the cost falls to a fifth, whatever the random seed."""
    space = space_of()
    # NTK below pair 17, and then a rise that no method knows.
    target = with_critical([2.5 + 0.15 * max(0, index - 17) for index in range(PAIRS)], 17)

    def cost(candidate: Candidate) -> float:
        apart = sum((log(a) - log(b)) ** 2 for a, b in zip(candidate.factors, target, strict=True))
        return apart + 20 * (candidate.attention_factor - 1.1) ** 2

    seeds = min(cost(candidate) for candidate in space.seeds())
    for seed in range(3):
        best = best_first(evolve(space, cost, seed), 0.0)[0]
        assert best.long < seeds / 5
        assert abs(best.candidate.attention_factor - 1.1) < 0.05


@pytest.mark.parametrize("factor", [1.37, 4.0, 16.0])
def test_every_candidate_keeps_the_constraints(factor: float) -> None:
    """Never falling, between 1 and 1.25 s, NTK below the critical pair."""
    space, draw = space_of(factor), Random(1)
    pool = space.seeds()
    for number in range(600):
        one = draw.choice(pool)
        pool.append(cross(space, one, draw.choice(pool), draw) if number % 2 else mutate(space, one, draw))
    for candidate in pool:
        factors = candidate.factors
        assert len(factors) == PAIRS
        assert all(before <= after for before, after in pairwise(factors)), candidate
        assert factors[0] >= 1
        assert factors[-1] <= MOST * factor + 1e-12
        assert 1 <= candidate.attention_factor <= space.most_attention
        if candidate.critical:
            assert factors == with_critical(factors, candidate.critical)
            # Spelled out: lambda_i = lambda_c ** (i / c) below the critical pair.
            for index in range(candidate.critical):
                expected = factors[candidate.critical] ** (index / candidate.critical)
                assert factors[index] == pytest.approx(expected, abs=6e-5)
    assert len({candidate.content for candidate in pool}) > 300


def test_searched_factors_are_on_the_grid() -> None:
    """Steps of 0.01 from the critical pair on."""
    space, draw = space_of(), Random(2)
    critical = space.criticals()[0]
    start = next(candidate for candidate in space.seeds() if candidate.critical == critical)
    for _ in range(200):
        child = mutate(space, start, draw)
        for value in child.factors[child.critical :]:
            assert value * 100 == pytest.approx(round(value * 100), abs=1e-6)


def test_the_critical_pair_is_the_first_whose_period_is_longer() -> None:
    """LongRoPE2's formula, and the wavelengths themselves."""
    space = space_of()
    theory = ceil(PAIRS * log(LENGTH / (2 * pi)) / log(THETA))  # LongRoPE2, section 2
    assert space.criticals() == (theory, 19, 17, 16)
    assert theory == 20
    assert 2 * pi * THETA ** (theory / PAIRS) > LENGTH > 2 * pi * THETA ** ((theory - 1) / PAIRS)


def test_yarn_is_the_first_seed_and_none_comes_twice() -> None:
    """What everything is compared with is tried first."""
    space = space_of()
    seeds = space.seeds()
    assert (seeds[0].factors, seeds[0].attention_factor) == (space.yarn, space.yarn_attention)
    assert len({seed.content for seed in seeds}) == len(seeds)
    assert {seed.critical for seed in seeds} == {0, *space.criticals()}


def test_children_are_new_and_decided_by_the_seed() -> None:
    """The same seed gives the same children, and no two are alike."""
    space = space_of()
    seeds = space.seeds()
    one, again, other = (children(space, seeds, seeds, count=8, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    contents = [candidate.content for candidate in [*seeds, *one]]
    assert len(set(contents)) == len(contents) == len(seeds) + 8
    assert {candidate.origin for candidate in one} == {"mutation", "crossing"}


def test_a_space_that_is_used_up_gives_fewer_children() -> None:
    """It ends, and nothing is tried twice."""
    flat = SearchSpace((1.0, 0.0001), 8192, 1.0, (1.0, 1.0), 1.0, (1.0, 1.0))
    only = Candidate((1.0, 1.0), 0, 1.0, "only")
    had = [only]
    for seed in range(200):
        had += children(flat, [only], had, count=50, seed=seed)
    assert len({candidate.content for candidate in had}) == len(had)


def test_short_texts_limit_the_choice() -> None:
    """What is over the limit is neither chosen nor ranked well."""
    candidate = space_of().seeds()[0]
    fair, best, broken = (
        Measured(candidate, long, short) for long, short in ((2.9, 3.0), (2.8, 3.0), (2.5, 3.2))
    )
    assert chosen([fair, best, broken], 3.0) == best
    assert chosen([broken], 3.0) is None
    assert best_first([broken, fair, best], 3.0) == [best, fair, broken]


def test_the_space_of_a_config() -> None:
    """Known methods as factors: YaRN's ramp between 1 and s, NTK's from 1 to s."""
    config = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_attention_heads": 9,
        "max_position_embeddings": LENGTH,
        "rope_theta": THETA,
    }
    found, expected = SearchSpace.of(config, ContextSpec("longrope", 4 * LENGTH)), space_of()
    assert (found.factor, found.original_length) == (4.0, LENGTH)
    for name in ("frequencies", "yarn", "ntk"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12), name
    assert found.yarn_attention == pytest.approx(expected.yarn_attention)
    gemma = config | {"model_type": "gemma3_text"}
    with pytest.raises(UserError, match="layers of model_type 'gemma3_text'"):
        SearchSpace.of(gemma, ContextSpec("longrope", 4 * LENGTH))


def test_a_candidate_is_written_as_it_was_scored() -> None:
    """Factors and multiplier, as both engines read them."""
    config = {"model_type": "llama", "head_dim": 4, "max_position_embeddings": 64, "rope_theta": 1e4}
    candidate = Candidate((1.0, 3.5), 0, 1.21, "mutation")
    context = candidate.context(ContextSpec("longrope", 256))
    rope = scaled_config(config, context).config["rope_parameters"]
    assert isinstance(rope, dict)
    assert rope["long_factor"] == rope["short_factor"] == [1.0, 3.5]
    assert rope["attention_factor"] == rope["short_mscale"] == rope["long_mscale"] == 1.21
