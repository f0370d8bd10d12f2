"""Circles at the end of texts, against a slow search for them."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics.loops import looping


def _slow(ids: list[int]) -> bool:
    """Whether some circle fills the end: tried turn by turn."""
    for period in range(1, min(64, len(ids) - 1) + 1):
        end = period
        while end < len(ids) and ids[len(ids) - 1 - end] == ids[len(ids) - 1 - end + period]:
            end += 1
        if end >= max(3 * period, len(ids) // 4, 4):
            return True
    return False


@pytest.mark.parametrize(
    "ids, loops",
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], False),
        ([1, 2, 3, 4, 5, 6, 7, 7, 7, 7], True),
        ([1, 2, 3, 4, 5, 6, 7, 8, 7, 7], False),  # twice is no circle
        ([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([9, 8, 7, 1, 2, 3, 1, 2, 3, 1], False),  # not three turns
        ([1, 2] * 10 + [5], False),  # it came out of it
    ],
)
def test_by_hand(ids: list[int], loops: bool) -> None:
    """What a reader would say."""
    assert bool(looping(torch.tensor([ids]))[0]) == loops


def test_as_the_slow_search() -> None:
    """On random texts of few tokens, of which many loop by chance."""
    ids_NT = torch.randint(2, (400, 24), generator=torch.Generator().manual_seed(0))
    found = looping(ids_NT).tolist()
    assert found == [_slow(row) for row in ids_NT.tolist()]
    assert 20 < sum(found) < 380
