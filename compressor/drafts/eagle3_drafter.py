"""An EAGLE-3 head at work in the decoding loop, with a KV cache of its own.

The cache has one slot for each token but the first of a text; those of proposals lie behind the kept ones and
are overwritten by what the target says instead, as in vLLM 0.32 (v1/spec_decode/llm_base_proposer.py).

Legend: B sequences, T tokens of the prompt, Q new slots, C slots of the cache, K proposed, D hidden size,
H heads, G heads of keys and values, E dimensions of a head, V vocabulary of the target, R of the head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import scaled_dot_product_attention

from compressor.drafts.base import Proposal
from compressor.drafts.eagle3 import Eagle3Head


class Eagle3Drafter:
    """``drafts.base.Drafter`` of a head."""

    def __init__(self, head: Eagle3Head) -> None:
        self._head = head
        empty = torch.empty(0, device=head.device)
        self._key_BGCE = self._value_BGCE = self._recycled_B1D = empty
        # Slots that hold what the target confirmed.
        self._filled_B = empty.long()
        self._proposed_BK = empty.long()

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads."""
        return self._head.shape.layers

    @torch.no_grad()
    def begin(self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor], next_B: torch.Tensor) -> None:
        """See the protocol."""
        head, device = self._head, self._head.device
        batch, length = ids_BT.shape
        shape = (batch, head.shape.kv_heads, 2 * length + 1, head.shape.head_dim)
        self._key_BGCE = torch.zeros(shape, dtype=head.dtype, device=device)
        self._value_BGCE = torch.zeros_like(self._key_BGCE)
        self._filled_B = torch.zeros(batch, dtype=torch.int64, device=device)
        tokens_BT = torch.cat([ids_BT[:, 1:], next_B[:, None]], dim=1).to(device)
        out_BTD = self._step(tokens_BT, head.combine(hidden), self._filled_B)
        self._recycled_B1D = out_BTD[:, -1:]
        self._filled_B = self._filled_B + length

    @torch.no_grad()
    def propose(self, count: int, generator: torch.Generator | None, temperature: float) -> Proposal:
        """See the protocol."""
        hidden_B1D = self._recycled_B1D
        ids: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        for step in range(count):
            if step:
                hidden_B1D = self._step(ids[-1][:, None], hidden_B1D, self._filled_B + step - 1)
            logits_BR = self._head.logits(hidden_B1D[:, 0])
            if temperature == 0:
                ids.append(self._head.target_ids(logits_BR.argmax(-1)))
                continue
            probs_BV = self._over_target((logits_BR / temperature).softmax(-1))
            probs.append(probs_BV)
            ids.append(torch.multinomial(probs_BV, 1, generator=generator)[:, 0])
        self._proposed_BK = torch.stack(ids, dim=1)
        return Proposal(self._proposed_BK, torch.stack(probs, dim=1) if probs else None)

    @torch.no_grad()
    def keep(self, hidden: Mapping[int, torch.Tensor], kept_B: torch.Tensor, next_B: torch.Tensor) -> None:
        """See the protocol."""
        kept_B, next_B = kept_B.to(self._filled_B.device), next_B.to(self._filled_B.device)
        tokens_BQ = torch.cat([self._proposed_BK, next_B[:, None]], dim=1)
        tokens_BQ = tokens_BQ.scatter(1, kept_B[:, None], next_B[:, None])
        # Slots behind the kept ones hold nonsense until they are written again: nothing looks ahead.
        out_BQD = self._step(tokens_BQ, self._head.combine(hidden), self._filled_B)
        self._recycled_B1D = out_BQD.gather(1, kept_B[:, None, None].expand(-1, 1, out_BQD.shape[-1]))
        self._filled_B = self._filled_B + kept_B + 1

    def select(self, rows_R: torch.Tensor) -> None:
        """See the protocol."""
        rows_R = rows_R.to(self._filled_B.device)
        self._key_BGCE, self._value_BGCE = self._key_BGCE[rows_R], self._value_BGCE[rows_R]
        self._recycled_B1D, self._filled_B = self._recycled_B1D[rows_R], self._filled_B[rows_R]

    def _step(self, ids_BQ: torch.Tensor, hidden_BQD: torch.Tensor, first_B: torch.Tensor) -> torch.Tensor:
        """Writes Q slots from ``first_B`` on; what the head puts out for them, [B, Q, D]."""
        slots_BQ = first_B[:, None] + torch.arange(ids_BQ.shape[1], device=first_B.device)
        made = self._head.project(ids_BQ, hidden_BQD, slots_BQ)
        self._grow(int(slots_BQ.max()) + 1)
        index_BGQE = slots_BQ[:, None, :, None].expand_as(made.key_BGTE)
        self._key_BGCE.scatter_(2, index_BGQE, made.key_BGTE)
        self._value_BGCE.scatter_(2, index_BGQE, made.value_BGTE)
        cached_C = torch.arange(self._key_BGCE.shape[2], device=first_B.device)
        attended_BHQE = scaled_dot_product_attention(
            made.query_BHTE,
            self._key_BGCE,
            self._value_BGCE,
            attn_mask=(cached_C <= slots_BQ[:, :, None])[:, None],
            enable_gqa=True,
        )
        return self._head.finish(attended_BHQE, made.residual_BTD)

    def _grow(self, slots: int) -> None:
        """Room for so many slots."""
        missing = slots - self._key_BGCE.shape[2]
        if missing > 0:
            more = max(missing, self._key_BGCE.shape[2])
            room = self._key_BGCE.new_zeros(*self._key_BGCE.shape[:2], more, self._key_BGCE.shape[3])
            self._key_BGCE = torch.cat([self._key_BGCE, room], dim=2)
            self._value_BGCE = torch.cat([self._value_BGCE, room], dim=2)

    def _over_target(self, probs_BR: torch.Tensor) -> torch.Tensor:
        """fp32 [B, V]: zero for tokens that the head does not know."""
        if self._head.vocabulary is None:
            return probs_BR
        whole_BV = probs_BR.new_zeros(len(probs_BR), self._head.shape.vocabulary)
        whole_BV[:, self._head.vocabulary.ids_R.to(probs_BR.device)] = probs_BR
        return whole_BV
