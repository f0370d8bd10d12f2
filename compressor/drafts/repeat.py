"""The last token once more: a control. What it scores, any drafter would score on such text.

Legend: B sequences, K proposed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compressor.drafts.base import Proposal

if TYPE_CHECKING:
    import torch


class RepeatLast:
    """Proposes the last token K times."""

    layers: tuple[int, ...] = ()

    def begin(self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor], next_B: torch.Tensor) -> None:
        """See ``Drafter``."""
        self._last_B = next_B

    def propose(self, count: int, generator: torch.Generator | None, temperature: float) -> Proposal:
        """See ``Drafter``; never a draw."""
        return Proposal(self._last_B[:, None].repeat(1, count))

    def keep(self, hidden: Mapping[int, torch.Tensor], kept_B: torch.Tensor, next_B: torch.Tensor) -> None:
        """See ``Drafter``."""
        self._last_B = next_B

    def select(self, rows_R: torch.Tensor) -> None:
        """See ``Drafter``."""
        self._last_B = self._last_B[rows_R]
