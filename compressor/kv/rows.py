"""Codecs that treat every token and head alike: rows of one width in, rows of bytes out.

Legend: B sequences, H KV heads, T tokens, D head_dim, N = B * H * T rows, S bytes of a slot.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from compressor.kv.base import KvCodec

# Elements that the CPU treats at once: what a chunk needs stays in its caches. A GPU takes all at once.
_CPU_CHUNK = 1 << 17


class RowCodec(KvCodec):
    """A codec whose slot depends on its row alone, not on the head."""

    @abstractmethod
    def encode_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """uint8 [N, S] of rows in the model's dtype."""

    @abstractmethod
    def decode_rows(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D]."""

    def encode(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, T, S] of float keys or values [B, H, T, D], on their device."""
        head_dim = x_BHTD.shape[-1]
        rows = x_BHTD.reshape(-1, head_dim)
        slots = torch.empty(len(rows), self.slot_bytes(head_dim), dtype=torch.uint8, device=rows.device)
        for part in _parts(rows, head_dim):
            slots[part] = self.encode_rows(rows[part])
        return slots.view(*x_BHTD.shape[:-1], slots.shape[1])

    def decode(self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, T, D] in ``dtype`` of what ``encode`` made."""
        slots = slots_BHTS.reshape(-1, slots_BHTS.shape[-1])
        rows = torch.empty(len(slots), head_dim, dtype=dtype, device=slots.device)
        for part in _parts(slots, head_dim):
            rows[part] = self.decode_rows(slots[part], head_dim)
        return rows.view(*slots_BHTS.shape[:-1], head_dim)


def _parts(rows: torch.Tensor, head_dim: int) -> list[slice]:
    size = max(1, _CPU_CHUNK // head_dim) if rows.device.type == "cpu" else max(1, len(rows))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def divided(x: torch.Tensor, number: float) -> torch.Tensor:
    """x / number, rounded once: on CUDA torch would multiply by the reciprocal of a Python number."""
    return x / torch.full_like(x, number)


def as_bytes(numbers: torch.Tensor) -> torch.Tensor:
    """[N] or [N, K] of any dtype -> its little-endian bytes, uint8 [N, itemsize * K]."""
    return numbers.reshape(len(numbers), -1).contiguous().view(torch.uint8)


def from_bytes(part_NS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of ``as_bytes`` for columns of a slot, widened to fp32: [N, K]."""
    return part_NS.contiguous().view(dtype).float()
