"""Starved experts: what they are topped up with, however tokens are batched and passes ordered."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from compressor.model.blocks import Site
from compressor.model.routed import Share
from compressor.stages.experts import Experts, enough_rows

WIDTH = 64
ENOUGH = 8
EXPERT = "model.layers.0.mlp.experts.1"
UP = Site(f"{EXPERT}.up", (), (), WIDTH, True)
DOWN = Site(f"{EXPERT}.down", (), (), WIDTH // 2, True)


def _rows(tokens: int) -> torch.Tensor:
    """Hidden states [N, H] that say which token they are of."""
    return torch.arange(tokens, dtype=torch.float32)[:, None].expand(tokens, WIDTH)


def _heard(
    batches: Sequence[int], own: set[int], score_N: torch.Tensor | None, *, offers: bool = True
) -> tuple[Experts, list[int], torch.Tensor | None]:
    """What an expert with ``own`` tokens is topped up with when the tokens come in such batches."""
    experts = Experts([UP, DOWN], {EXPERT})
    topping = experts.passing([UP])
    x_NH, first = _rows(sum(batches)), 0
    for size in batches:
        x_MH = x_NH[first : first + size]
        tokens_M = torch.tensor(
            [t - first for t in sorted(own) if first <= t < first + size], dtype=torch.int64
        )
        score = None if score_N is None else score_N[first : first + size]
        offered = x_MH.__getitem__ if offers else None
        topping.hear(UP, Share(x_MH[tokens_M], tokens_M, size, score, offered, lambda x: x))
        first += size
    topping.finish()
    rows = topping.rows(UP)
    return experts, [] if rows is None else [int(row[0]) for row in rows], rows


def test_enough_is_an_eighth_of_the_width() -> None:
    """And never nothing."""
    assert [enough_rows(width) for width in (1, 4, 64, 5120)] == [1, 1, 8, 640]
    assert enough_rows(WIDTH) == ENOUGH


@pytest.mark.parametrize("batches", [[40], [1] * 40, [7, 13, 20], [20, 20]])
@pytest.mark.parametrize("own", [set(), {3}, {0, 5, 39}, set(range(7))])
def test_the_highest_scores_of_all_tokens(batches: list[int], own: set[int]) -> None:
    """Up to enough, best first, of equal scores the first token; never its own, however they are batched."""
    numbers = torch.Generator().manual_seed(0)
    score_N = torch.randint(0, 6, (40,), generator=numbers).float()  # many are equal
    score_N[[8, 9]] = torch.tensor([float("inf"), float("nan")])  # such a score says nothing
    experts, found, _ = _heard(batches, own, score_N)
    others = [token for token in range(40) if token not in own and token not in (8, 9)]
    others.sort(key=lambda token: (-float(score_N[token]), token))
    assert found == others[: ENOUGH - len(own)]
    (coverage,) = experts.coverage(lambda name: name == EXPERT.removesuffix(".1"))
    assert coverage.name == EXPERT.removesuffix(".1")
    assert (coverage.tokens, coverage.topped_up) == ((len(own),), (ENOUGH - len(own),))
    assert (coverage.enough, coverage.starved, coverage.never_reached) == (ENOUGH, 1, int(not own))
    assert coverage.scored
    assert coverage.shared_range


def test_enough_tokens_are_left_alone() -> None:
    """Whoever has as many as it needs gets no others, even if they come last."""
    experts, found, _ = _heard([20, 20], set(range(40 - ENOUGH, 40)), torch.zeros(40))
    assert found == []
    (coverage,) = experts.coverage(lambda _: False)
    assert (coverage.starved, coverage.topped_up, coverage.shared_range) == (0, (0,), False)


@pytest.mark.parametrize("batches", [[40], [9, 31]])
def test_without_scores_tokens_are_spread(batches: list[int]) -> None:
    """No quarter of the text is left out, and it is said that scores are not known."""
    experts, found, _ = _heard(batches, {0}, None)
    assert len(found) == ENOUGH - 1
    assert {token // 10 for token in found} == {0, 1, 2, 3}
    assert found == _heard([40], {0}, None)[1]
    assert not experts.coverage(lambda _: False)[0].scored


def test_nothing_on_offer() -> None:
    """Where it is not even known what the expert would be given, it keeps its own tokens alone."""
    experts, found, rows = _heard([40], {0}, None, offers=False)
    assert (found, rows) == ([], None)
    assert experts.topped_up(UP) == 0
    assert not experts.coverage(lambda _: False)[0].scored


def test_fewer_tokens_than_enough() -> None:
    """Then it gets all there are."""
    assert _heard([4], {2}, torch.tensor([0.1, 0.3, 0.9, 0.2]))[1] == [1, 3, 0]


def test_later_products_are_of_the_same_tokens() -> None:
    """What the expert makes of them; a later pass finds no others."""
    experts, _, rows = _heard([40], {0}, torch.rand(40, generator=torch.Generator().manual_seed(1)))
    assert rows is not None
    later = experts.passing([DOWN])
    x_MH = _rows(40)
    later.hear(UP, Share(x_MH[:1], torch.tensor([0]), 40, torch.arange(40.0), x_MH.__getitem__, lambda x: x))
    later.hear(DOWN, Share(x_MH[:1], torch.tensor([0]), 40, None, None, lambda x: 2 * x[:, : WIDTH // 2]))
    later.finish()
    made = later.rows(DOWN)
    assert made is not None
    assert torch.equal(made, 2 * rows[:, : WIDTH // 2])
    assert experts.topped_up(DOWN) == ENOUGH - 1


def test_what_no_pass_has_counted_is_not_told() -> None:
    """Nothing is known of experts that a solver learns without hearing their inputs."""
    assert Experts([UP, DOWN], {EXPERT}).coverage(lambda _: False) == []


def test_experts_that_need_no_data_are_not_looked_at() -> None:
    """No coverage, no rows."""
    experts = Experts([UP, DOWN], set())
    topping = experts.passing([UP, DOWN])
    x_MH = _rows(4)
    topping.hear(UP, Share(x_MH, torch.arange(4), 4, None, x_MH.__getitem__, lambda x: x))
    topping.finish()
    assert topping.rows(UP) is None
    assert experts.coverage(lambda _: False) == []
