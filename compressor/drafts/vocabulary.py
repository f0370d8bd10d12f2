"""The tokens that a draft head knows: the most frequent ones of the target's vocabulary.

What is left out can never be proposed, and costs acceptance; what is kept costs the product with the output
head, most of a small head's work (FR-Spec, arXiv 2502.14856).

Legend: N tokens of texts, V vocabulary of the target, R of the head.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """A part of the target's vocabulary.

    Attributes:
        ids_R: the target's ids, increasing: token r of the head is token ``ids_R[r]`` of the target.
        size: V.
    """

    ids_R: torch.Tensor
    size: int

    def __post_init__(self) -> None:
        assert self.ids_R.dtype == torch.int64

    @property
    def d2t_R(self) -> torch.Tensor:
        """int64: what must be added to the head's ids (speculators, data_generation/vocab_mapping.py)."""
        return self.ids_R - torch.arange(len(self.ids_R), device=self.ids_R.device)

    @property
    def t2d_V(self) -> torch.Tensor:
        """bool: which of the target's tokens the head knows."""
        known_V = torch.zeros(self.size, dtype=torch.bool, device=self.ids_R.device)
        known_V[self.ids_R] = True
        return known_V

    def coverage(self, counts_V: torch.Tensor) -> float:
        """Share of counted tokens that the head knows, 0 to 1; 0 where nothing was counted."""
        return float(counts_V[self.ids_R].sum() / counts_V.sum().clamp(min=1))


def count_tokens(ids_N: torch.Tensor, size: int) -> torch.Tensor:
    """int64 [V]: how often each id occurs; ids must be below ``size``."""
    return torch.bincount(ids_N.reshape(-1).long().cpu(), minlength=size)


def frequent_tokens(counts_V: torch.Tensor, size: int, always: Collection[int] = ()) -> DraftVocabulary:
    """The ``size`` most frequent tokens; among equals those with the lower ids.

    Args:
        counts_V: how often each of the target's tokens occurred.
        size: R, at most V.
        always: ids that are kept however rare they are: those that end a text, say.
    """
    assert len(always) <= size <= len(counts_V), f"{size} of {len(counts_V)} tokens"
    ranked_V = counts_V.to(torch.int64).cpu().clone()
    ranked_V[torch.tensor(sorted(always), dtype=torch.int64)] = torch.iinfo(torch.int64).max
    order_V = torch.sort(ranked_V, descending=True, stable=True).indices
    return DraftVocabulary(order_V[:size].sort().values, len(counts_V))
