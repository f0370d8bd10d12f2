"""Keys and values as e4m3: with static scales, or with a scale for each token and head.

Legend: B sequences, H KV heads, T tokens, D head_dim, N rows, S bytes of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressor.kv.base import KvCodec
from compressor.kv.rows import RowCodec, as_bytes, divided, from_bytes
from compressor.numerics.fp8 import E4M3_MAX, to_e4m3

_SCALE_BYTES = 4
# vLLM's floor under scales per token and head (triton_reshape_and_cache_flash.py).
LEAST_SCALE = 1e-6


class Fp8Codec(KvCodec):
    """e4m3(x / scale), ties to even, saturating at 448; the scale belongs to the layer.

    vLLM 0.32's ``fp8`` (``reshape_and_cache_flash``), and with scale 1 the keys of its ``turboquant_k8v4``.

    Args:
        scale: fp32, one number or one for each KV head [H]; None for 1.

    Raises:
        ValueError: a scale that is not positive and finite, or of another shape.
    """

    kind = "fp8"

    def __init__(self, scale: torch.Tensor | None = None) -> None:
        scale = torch.ones(()) if scale is None else scale.float()
        if scale.ndim > 1 or not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError("an fp8 cache needs one positive scale, or one for each KV head")
        self._scale = scale
        self.kv_heads = None if scale.numel() == 1 else scale.numel()

    def slot_bytes(self, head_dim: int) -> int:
        """A byte an element."""
        return head_dim

    def encode(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, T, D]."""
        return to_e4m3(x_BHTD.float() / self._scale_H11(x_BHTD)).view(torch.uint8)

    def decode(self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, T, D] in ``dtype``."""
        assert slots_BHTS.shape[-1] == head_dim, "slots of another head_dim"
        codes = slots_BHTS.contiguous().view(torch.float8_e4m3fn)
        return (codes.float() * self._scale_H11(slots_BHTS)).to(dtype)

    def _scale_H11(self, like: torch.Tensor) -> torch.Tensor:
        if self._scale.numel() not in (1, like.shape[1]):
            raise ValueError(f"{self._scale.numel()} scales for {like.shape[1]} KV heads")
        return self._scale.to(like.device).reshape(-1, 1, 1)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The scale."""
        return {"scale": self._scale}


class Fp8TokenHeadCodec(RowCodec):
    """e4m3 codes, then their scale in fp32: largest magnitude / 448, at least 1e-6.

    vLLM 0.32's ``fp8_per_token_head`` (``v1/attention/ops/triton_reshape_and_cache_flash.py``). vLLM keeps
    codes and scales of a page apart; the bytes are the same.
    """

    kind = "fp8_per_token_head"

    def slot_bytes(self, head_dim: int) -> int:
        """A byte an element, and the scale."""
        return head_dim + _SCALE_BYTES

    def encode_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """uint8 [N, D + 4]."""
        x = x_ND.float()
        scale = token_scales(x, E4M3_MAX)
        codes = to_e4m3(x * (1.0 / scale)).view(torch.uint8)
        return torch.cat((codes, as_bytes(scale)), dim=1)

    def decode_rows(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D]."""
        codes = slots_NS[:, :head_dim].contiguous().view(torch.float8_e4m3fn)
        return codes.float() * from_bytes(slots_NS[:, head_dim:], torch.float32)


def token_scales(x_ND: torch.Tensor, largest: float) -> torch.Tensor:
    """fp32 [N, 1]: what makes the largest magnitude of each row ``largest``, at least vLLM's floor."""
    return divided(x_ND.abs().amax(dim=1, keepdim=True), largest).clamp(min=LEAST_SCALE)
