"""Codecs for tests of the cache: one that loses nothing, and one that loses visibly."""

from __future__ import annotations

import torch

from compressor.kv.base import KvCodec


class Plain(KvCodec):
    """The bytes of float32, so that nothing is lost."""

    kind = "plain"

    def slot_bytes(self, head_dim: int) -> int:
        return 4 * head_dim

    def encode(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        return x_BHTD.float().contiguous().view(torch.uint8)

    def decode(self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        del head_dim
        return slots_BHTS.contiguous().view(torch.float32).to(dtype)


class Plain16(KvCodec):
    """The bytes of bfloat16: loses nothing of a model that computes in it."""

    kind = "plain16"

    def slot_bytes(self, head_dim: int) -> int:
        return 2 * head_dim

    def encode(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        return x_BHTD.bfloat16().contiguous().view(torch.uint8)

    def decode(self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        del head_dim
        return slots_BHTS.contiguous().view(torch.bfloat16).to(dtype)


class Coarse(KvCodec):
    """Multiples of ``step`` in one byte each: an error far above rounding."""

    kind = "coarse"

    def __init__(self, step: float = 0.25) -> None:
        self.step = step

    def slot_bytes(self, head_dim: int) -> int:
        return head_dim

    def encode(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        return ((x_BHTD / self.step).round() + 128).clamp(0, 255).to(torch.uint8)

    def decode(self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        del head_dim
        return (slots_BHTS.float().sub(128) * self.step).to(dtype)

    def problem(self, head_dim: int) -> str | None:
        return f"heads of {head_dim} are odd" if head_dim % 2 else None
