"""Proposals of a prediction layer, one after another, from keys and values that it keeps.

Slot i reads token i + 1 and the target's hidden state i at position i; step k of a proposal reads the token
and the state that step k - 1 made, at position i + k, and leaves nothing behind (vLLM 0.32
``v1/spec_decode/llm_base_proposer.py`` propose). Sequences keep different numbers of tokens: slots of refused
ones stay in the cache and are never attended to.

Legend: B sequences, T slots being read, S slots of the cache, K proposed, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressor.drafts.base import LAST, Proposal
from compressor.drafts.native_layer import PredictionLayer


class NativeDrafter:
    """A ``Drafter`` of a checkpoint's own prediction layer.

    Attributes:
        layers: the hidden state behind the target's last norm.

    Args:
        layer: applied as many times as there are tokens to propose.
    """

    layers: tuple[int, ...] = (LAST,)

    def __init__(self, layer: PredictionLayer) -> None:
        self._layer = layer

    @torch.no_grad()
    def begin(self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor], next_B: torch.Tensor) -> None:
        """See ``Drafter.begin``."""
        from transformers import DynamicCache

        self._cache = DynamicCache()
        self._seen_BS = torch.empty(len(ids_BT), 0, dtype=torch.bool, device=ids_BT.device)
        self._position_B = torch.zeros_like(next_B)
        self._proposed_BK = ids_BT[:, 1:]
        self.keep(hidden, torch.full_like(next_B, ids_BT.shape[1] - 1), next_B)

    @torch.no_grad()
    def propose(self, count: int, generator: torch.Generator | None, temperature: float) -> Proposal:
        """See ``Drafter.propose``."""
        recycled_BD, normed_BD, seen_BS = self._recycled_BD, self._normed_BD, self._seen_BS
        ids: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        for step in range(count):
            if step:
                seen_BS = torch.cat([seen_BS, torch.ones_like(seen_BS[:, :1])], dim=1)
                recycled_B1D, normed_B1D = self._layer(
                    ids[-1][:, None],
                    recycled_BD[:, None],
                    # The last slot read is one before the position of the next.
                    (self._position_B - 1 + step)[:, None],
                    seen_BS[:, None],
                    self._cache,
                )
                recycled_BD, normed_BD = recycled_B1D[:, 0], normed_B1D[:, 0]
            logits_BV = self._layer.logits(normed_BD)
            if temperature:
                probs.append(torch.softmax(logits_BV / temperature, dim=-1))
                ids.append(torch.multinomial(probs[-1], 1, generator=generator)[:, 0])
            else:
                ids.append(logits_BV.argmax(dim=-1))
        if count > 1:
            self._cache.crop(1 - count)
        self._proposed_BK = torch.stack(ids, dim=1)
        return Proposal(self._proposed_BK, torch.stack(probs, dim=1) if probs else None)

    @torch.no_grad()
    def keep(self, hidden: Mapping[int, torch.Tensor], kept_B: torch.Tensor, next_B: torch.Tensor) -> None:
        """See ``Drafter.keep``."""
        hidden_BTD = hidden[LAST]
        slots_T = torch.arange(hidden_BTD.shape[1], device=next_B.device)
        # Tokens 1 to K behind the slots 0 to K - 1; behind the last kept one the target's own.
        ids_BT = torch.cat([self._proposed_BK, next_B[:, None]], dim=1)
        ids_BT = torch.where(slots_T == kept_B[:, None], next_B[:, None], ids_BT)
        valid_BT = slots_T <= kept_B[:, None]
        causal_TT = slots_T[:, None] >= slots_T
        own_TT = slots_T[:, None] == slots_T
        now_BTT = (causal_TT & valid_BT[:, None]) | own_TT  # a refused slot sees itself: no row is empty
        before_BTS = self._seen_BS[:, None].expand(-1, len(slots_T), -1)
        recycled_BTD, normed_BTD = self._layer(
            ids_BT,
            hidden_BTD,
            self._position_B[:, None] + slots_T,
            torch.cat([before_BTS, now_BTT], dim=2),
            self._cache,
        )
        rows_B = torch.arange(len(next_B), device=next_B.device)
        self._recycled_BD, self._normed_BD = recycled_BTD[rows_B, kept_B], normed_BTD[rows_B, kept_B]
        self._seen_BS = torch.cat([self._seen_BS, valid_BT], dim=1)
        self._position_B = self._position_B + kept_B + 1

    def select(self, rows_R: torch.Tensor) -> None:
        """See ``Drafter.select``."""
        self._cache.batch_select_indices(rows_R)
        self._seen_BS, self._position_B = self._seen_BS[rows_R], self._position_B[rows_R]
        self._recycled_BD, self._normed_BD = self._recycled_BD[rows_R], self._normed_BD[rows_R]
