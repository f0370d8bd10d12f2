"""Frequent tokens, and the maps of the speculators format."""

from __future__ import annotations

import torch

from compressor.drafts.vocabulary import count_tokens, frequent_tokens


def test_frequent() -> None:
    """The most frequent; among equals the lower ids; those asked for however rare."""
    counts_V = count_tokens(torch.tensor([[5, 5, 5, 2], [2, 7, 1, 5]]), 9)
    assert counts_V.tolist() == [0, 1, 2, 0, 0, 4, 0, 1, 0]
    assert frequent_tokens(counts_V, 3).ids_R.tolist() == [1, 2, 5]
    assert frequent_tokens(counts_V, 6).ids_R.tolist() == [0, 1, 2, 3, 5, 7]
    kept = frequent_tokens(counts_V, 3, always=[8])
    assert kept.ids_R.tolist() == [2, 5, 8]
    assert kept.coverage(counts_V) == 6 / 8
    assert kept.coverage(torch.zeros(9, dtype=torch.int64)) == 0


def test_maps() -> None:
    """As vLLM applies them: a head's id plus its offset is the target's."""
    vocabulary = frequent_tokens(torch.tensor([0, 3, 0, 3, 3]), 3)
    assert vocabulary.d2t_R.tolist() == [1, 2, 2]
    assert vocabulary.t2d_V.tolist() == [False, True, False, True, True]
    assert (torch.arange(3) + vocabulary.d2t_R).tolist() == vocabulary.ids_R.tolist()
