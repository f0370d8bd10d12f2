"""Experts whose weights stay in the source: each is read when it is computed, and let go.

For blocks that do not fit in memory. What is computed is what ``routed.heard_forward`` computes with all
experts at once: on the CPU products of a batch of matrices are, one by one, the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Name of a parameter, number of an expert -> its entry of that parameter.
ReadExpert = Callable[[str, int], torch.Tensor]


class StoredExperts(nn.Module):
    """Stands in the place of a module of experts.

    Attributes:
        original: the module, without the parameters that are read.
        weight: reads one expert's entry of a parameter.
    """

    def __init__(self, original: nn.Module, weight: ReadExpert) -> None:
        super().__init__()
        self.original = original
        self.weight = weight

    def forward(self, *args: Any) -> torch.Tensor:
        """The experts' output; nobody listens."""
        from compressor.model.routed import heard_forward

        return heard_forward(self, lambda _phase, _shares: None, {})(*args)


def original(experts: nn.Module) -> Any:
    """The module as transformers made it."""
    return experts.original if isinstance(experts, StoredExperts) else experts


def expert_weight(experts: Any, name: str, expert: int) -> torch.Tensor:
    """One expert's entry of a parameter, wherever it is."""
    if isinstance(experts, StoredExperts):
        return experts.weight(name, expert)
    found: torch.Tensor = getattr(experts, name)[expert]
    return found
