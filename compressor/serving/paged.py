"""Attention over a paged cache of packed slots, in plain torch: what the vLLM plug-in computes.

Correct for any codec, and slow: the slots of each sequence are gathered and decoded at every step, and then
attended to by torch's own attention. It saves memory, not time.

Legend: N blocks of a cache, H KV heads, P tokens of a block, S bytes of a slot (key, then value), R sequences
of a batch, W entries of a row of the block table, T tokens of a batch or of a sequence, Q query heads,
G query heads of a KV head, D head_dim, L new tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from compressor.kv.base import KvCodec
from compressor.kv.plan import LayerPlan

# Elements of keys that are decoded at once, where one sequence does not have more.
_DECODED_ELEMENTS = 2**25
# Entries of the matrix of attention weights that torch may make at once.
_SCORES = 2**26


@dataclass(frozen=True)
class PagedCodecs:
    """How one layer's slots are written and read.

    Attributes:
        keys: codec of the first bytes of a slot.
        values: codec of the others.
        head_dim: elements of a head.
    """

    keys: KvCodec
    values: KvCodec
    head_dim: int

    @classmethod
    def of(cls, layer: LayerPlan) -> PagedCodecs:
        """Those of a packed layer of a plan."""
        assert layer.keys is not None
        assert layer.values is not None
        return cls(layer.keys, layer.values, layer.head_dim)

    @property
    def key_bytes(self) -> int:
        """Where in a slot the value begins."""
        return self.keys.slot_bytes(self.head_dim)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token in one KV head."""
        return self.key_bytes + self.values.slot_bytes(self.head_dim)


@dataclass(frozen=True)
class Batch:
    """What one step of an engine computes.

    Attributes:
        starts: R + 1 places in the batch's tokens: where each sequence's new tokens begin, and the end.
        lengths: R lengths of the sequences, new tokens included.
        tables_RW: the blocks of each sequence, in order; what lies beyond its length has no meaning.
        written: places in the batch of the tokens to be stored, or a slice over all.
        slots: for those tokens, block * P + place in the block.
    """

    starts: list[int]
    lengths: list[int]
    tables_RW: torch.Tensor
    written: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(
        cls, starts: list[int], lengths: list[int], tables_RW: torch.Tensor, slots_T: torch.Tensor
    ) -> Batch:
        """What engines tell: negative slots are not stored, tokens beyond ``starts`` are padding."""
        slots_T = slots_T[: starts[-1]]
        written = torch.nonzero(slots_T >= 0).flatten()
        return cls(starts, lengths, tables_RW, written, slots_T[written].long())

    def groups(self, kv_elements: int) -> Iterator[tuple[int, list[int]]]:
        """(new tokens, sequences with that many), few enough that their keys are decoded together.

        Args:
            kv_elements: of a token, over all KV heads.
        """
        by_new: dict[int, list[int]] = {}
        for number, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            if end > start:
                by_new.setdefault(end - start, []).append(number)
        for new, numbers in by_new.items():
            # Like lengths together: the shorter ones are padded.
            numbers.sort(key=lambda number: self.lengths[number])
            group: list[int] = []
            for number in numbers:
                if group and (len(group) + 1) * self.lengths[number] * kv_elements > _DECODED_ELEMENTS:
                    yield new, group
                    group = []
                group.append(number)
            yield new, group


def store(
    cache_NHPS: torch.Tensor,
    codecs: PagedCodecs,
    keys_THD: torch.Tensor,
    values_THD: torch.Tensor,
    batch: Batch,
) -> None:
    """Writes the keys and values of a batch's tokens into their slots."""
    if not len(batch.written):
        return
    sides = ((codecs.keys, keys_THD), (codecs.values, values_THD))
    slots_HTS = torch.cat([_encoded(codec, x_THD, batch) for codec, x_THD in sides], dim=-1)
    block_tokens = cache_NHPS.shape[2]
    block, place = batch.slots // block_tokens, batch.slots % block_tokens
    cache_NHPS[block, :, place] = slots_HTS.transpose(0, 1)


def _encoded(codec: KvCodec, x_THD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Slots [H, T, S] of the tokens to be stored."""
    if not codec.places:
        # A codec is given [B, H, T, D]: one sequence here, since no slot depends on another.
        return codec.encode(x_THD[batch.written].transpose(0, 1)[None])[0]
    parts = []
    for start, end, length in zip(batch.starts, batch.starts[1:], batch.lengths, strict=False):
        if end > start:
            parts.append(codec.encode_at(x_THD[start:end].transpose(0, 1)[None], length - (end - start))[0])
    return torch.cat(parts, dim=1)[:, batch.written - batch.starts[0]]


def attend(
    cache_NHPS: torch.Tensor,
    codecs: PagedCodecs,
    query_TQD: torch.Tensor,
    batch: Batch,
    scale: float,
    output_TQD: torch.Tensor,
) -> None:
    """Causal attention of every new token to all stored tokens of its sequence, itself included.

    Args:
        cache_NHPS: uint8, with the batch's own tokens stored.
        codecs: of the layer.
        query_TQD: in the model's dtype, which keys and values are decoded to; rows beyond the batch are
            ignored.
        batch: what is computed.
        scale: of the products of queries and keys.
        output_TQD: where results are written; rows beyond the batch are left alone.
    """
    kv_heads, head_dim = cache_NHPS.shape[1], codecs.head_dim
    for new, numbers in batch.groups(kv_heads * head_dim):
        lengths = [batch.lengths[number] for number in numbers]
        keys_RHTD, values_RHTD = _read(cache_NHPS, codecs, batch.tables_RW, numbers, lengths, query_TQD.dtype)
        rows_RL = torch.tensor([range(batch.starts[n], batch.starts[n] + new) for n in numbers])
        rows_RL = rows_RL.to(query_TQD.device)
        lengths_R = torch.tensor(lengths, device=query_TQD.device)
        heads = query_TQD.shape[1]
        step = max(1, _SCORES // (len(numbers) * heads * max(lengths)))
        for first in range(0, new, step):
            part_RL = rows_RL[:, first : first + step]
            size = part_RL.shape[1]
            # A query sees as many tokens as its sequence has up to it.
            seen_RL = lengths_R[:, None] - new + 1 + torch.arange(first, first + size, device=rows_RL.device)
            out_RLQD = _attention(query_TQD[part_RL], keys_RHTD, values_RHTD, seen_RL, scale)
            output_TQD[part_RL.flatten()] = out_RLQD.flatten(0, 1)


def _read(
    cache_NHPS: torch.Tensor,
    codecs: PagedCodecs,
    tables_RW: torch.Tensor,
    numbers: list[int],
    lengths: list[int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [R, H, T, D] of some sequences, zero where a sequence is shorter than the longest."""
    longest, block_tokens = max(lengths), cache_NHPS.shape[2]
    blocks_RW = tables_RW[numbers, : -(-longest // block_tokens)].long()
    # Entries beyond a sequence may be stale: any block will do there.
    slots_RWHPS = cache_NHPS[blocks_RW.clamp(0, len(cache_NHPS) - 1)]
    slots_RHTS = slots_RWHPS.permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :longest]
    split = codecs.key_bytes
    keys_RHTD = codecs.keys.decode(slots_RHTS[..., :split], codecs.head_dim, dtype)
    values_RHTD = codecs.values.decode(slots_RHTS[..., split:], codecs.head_dim, dtype)
    if min(lengths) < longest:
        lengths_R1 = torch.tensor(lengths, device=cache_NHPS.device)[:, None]
        beyond_RT = torch.arange(longest, device=cache_NHPS.device) >= lengths_R1
        # Bytes that nobody wrote may decode to NaN, which no mask takes out of a sum.
        for side_RHTD in (keys_RHTD, values_RHTD):
            side_RHTD.masked_fill_(beyond_RT[:, None, :, None], 0)
    return keys_RHTD, values_RHTD


def _attention(
    query_RLQD: torch.Tensor,
    keys_RHTD: torch.Tensor,
    values_RHTD: torch.Tensor,
    seen_RL: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[R, L, Q, D]; query (r, l) attends to the first ``seen_RL[r, l]`` tokens."""
    sequences, new, heads, head_dim = query_RLQD.shape
    kv_heads, tokens = keys_RHTD.shape[1:3]
    group = heads // kv_heads
    # Query heads of one KV head are further rows of its matrix: nothing is repeated.
    query_RHLGD = query_RLQD.view(sequences, new, kv_heads, group, head_dim).transpose(1, 2)
    mask_RLT = torch.arange(tokens, device=seen_RL.device) < seen_RL[..., None]
    mask_RLGT = mask_RLT[:, :, None].expand(-1, -1, group, -1)
    out_RHND = torch.nn.functional.scaled_dot_product_attention(
        query_RHLGD.reshape(sequences, kv_heads, new * group, head_dim),
        keys_RHTD,
        values_RHTD,
        attn_mask=mask_RLGT.reshape(sequences, 1, new * group, tokens),
        scale=scale,
    )
    return out_RHND.view(sequences, kv_heads, new, group, head_dim).transpose(1, 2).flatten(2, 3)
