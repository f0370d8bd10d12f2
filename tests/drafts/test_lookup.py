"""What followed the last tokens where they stood before."""

from __future__ import annotations

import torch

from compressor.drafts.lookup import PromptLookup, followed
from compressor.drafts.repeat import RepeatLast


def test_the_longest_tail_and_its_latest_place_decide() -> None:
    """By hand."""
    assert followed([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2, 4, 2) == [9, 2]
    assert followed([1, 2, 3, 9, 2, 3, 8, 5, 2, 3], 2, 4, 2) == [8, 5]
    assert followed([1, 2, 3, 4], 2, 4, 2) == []
    assert followed([5, 3, 5, 3], 3, 4, 2) == [5, 3, 5]
    assert followed([7, 1, 7], 1, 4, 2) == []
    assert followed([7, 1, 7], 1, 4, 1) == [1]
    assert followed([7], 1, 4, 1) == []


def test_each_sequence_is_looked_up_in_its_own_text() -> None:
    """Through keep and select; where nothing is found, the last token is repeated."""
    drafter = PromptLookup()
    drafter.begin(torch.tensor([[1, 2, 3, 1], [4, 5, 6, 7]]), {}, torch.tensor([2, 8]))
    assert drafter.propose(2, None, 0.0).ids_BK.tolist() == [[3, 1], [8, 8]]
    drafter.keep({}, torch.tensor([1, 0]), torch.tensor([9, 4]))
    drafter.keep({}, torch.tensor([0, 0]), torch.tensor([1, 5]))
    assert drafter.propose(1, None, 0.0).ids_BK.tolist() == [[1], [6]]
    drafter.select(torch.tensor([1]))
    assert drafter.propose(3, None, 0.0).ids_BK.tolist() == [[6, 7, 8]]


def test_the_last_token_is_repeated() -> None:
    """Of each sequence that is left."""
    drafter = RepeatLast()
    drafter.begin(torch.tensor([[1], [2]]), {}, torch.tensor([3, 4]))
    assert drafter.propose(2, None, 0.0).ids_BK.tolist() == [[3, 3], [4, 4]]
    drafter.keep({}, torch.tensor([0, 2]), torch.tensor([5, 6]))
    drafter.select(torch.tensor([1]))
    assert drafter.propose(1, None, 0.0).ids_BK.tolist() == [[6]]
