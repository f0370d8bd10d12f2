"""Keys and values as 16-bit floats: the cache that is not quantized (vLLM's ``auto``).

Legend: B sequences, H KV heads, T tokens, D head_dim, S bytes of a slot.
"""

from __future__ import annotations

import torch

from compressor.kv.base import KvCodec


class Bf16Codec(KvCodec):
    """bf16 as it is; what comes in another dtype is rounded to bf16."""

    kind = "bf16"

    def slot_bytes(self, head_dim: int) -> int:
        """Two bytes an element."""
        return 2 * head_dim

    def encode(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, T, 2 D]."""
        return x_BHTD.to(torch.bfloat16).contiguous().view(torch.uint8)

    def decode(self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, T, D] in ``dtype``."""
        assert slots_BHTS.shape[-1] == self.slot_bytes(head_dim), "slots of another head_dim"
        return slots_BHTS.contiguous().view(torch.bfloat16).to(dtype)
