"""Tokens that followed the last few where these stood before: a control that no training is needed for.

The n-grams of vLLM's method ``ngram`` (Saxena 2023, prompt lookup decoding), which proposes nothing where
none is found; here, where every sequence of a batch proposes, the last token is then repeated.

Legend: B sequences, K proposed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from compressor.drafts.base import Proposal

if TYPE_CHECKING:
    import torch


class PromptLookup:
    """Looks the last ``longest`` tokens up in the sequence so far, else fewer, down to ``shortest``."""

    layers: tuple[int, ...] = ()

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._longest, self._shortest = longest, shortest
        self._texts: list[list[int]] = []
        self._proposed: list[list[int]] = []

    def begin(self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor], next_B: torch.Tensor) -> None:
        """See ``Drafter``."""
        self._device = ids_BT.device
        self._texts = [[*ids, last] for ids, last in zip(ids_BT.tolist(), next_B.tolist(), strict=True)]

    def propose(self, count: int, generator: torch.Generator | None, temperature: float) -> Proposal:
        """See ``Drafter``; never a draw."""
        import torch

        self._proposed = [
            followed(text, count, self._longest, self._shortest) or [text[-1]] * count for text in self._texts
        ]
        return Proposal(torch.tensor(self._proposed, device=self._device))

    def keep(self, hidden: Mapping[int, torch.Tensor], kept_B: torch.Tensor, next_B: torch.Tensor) -> None:
        """See ``Drafter``."""
        for text, proposed, kept, own in zip(
            self._texts, self._proposed, kept_B.tolist(), next_B.tolist(), strict=True
        ):
            text += [*proposed[:kept], own]

    def select(self, rows_R: torch.Tensor) -> None:
        """See ``Drafter``."""
        self._texts = [self._texts[row] for row in rows_R.tolist()]


def followed(text: Sequence[int], count: int, longest: int, shortest: int) -> list[int]:
    """``count`` tokens after the latest earlier place of the longest tail that has one; [] where none has.

    Where the text ends before ``count`` tokens, they go on with what is proposed: a loop goes on.
    """
    for width in range(min(longest, len(text) - 1), shortest - 1, -1):
        tail = text[-width:]
        for start in range(len(text) - width - 1, -1, -1):
            if text[start : start + width] == tail:
                found = list(text)
                for place in range(count):
                    found.append(found[start + width + place])
                return found[len(text) :]
    return []
