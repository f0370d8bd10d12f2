"""Keys and values as NVFP4: e2m1 codes in blocks of 16 with e4m3 scales.

What vLLM 0.32 stores for ``nvfp4`` and ``nvfp4_4over6``, read from ``csrc/libtorch_stable/
nvfp4_kv_cache_kernels.cu`` and ``quantization/fp4/nvfp4_utils.cuh``: the global scale is the checkpoint's
``k_scale`` or ``v_scale``, 1 without one; a block's scale is e4m3(largest magnitude / 6 / global scale).

Not reproduced: vLLM multiplies by approximate reciprocals (``rcp.approx.ftz``), so that a value within an
fp32 rounding of a boundary may get the neighbouring code there; it keeps codes and scales of a page apart,
and on some GPUs those of the values in another order; its kernels run on GPUs alone.

Legend: N rows (a token in one KV head), D head_dim, G = D / 16 blocks, S bytes of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compressor.kv.rows import RowCodec
from compressor.numerics.fp4 import (
    E2M1_MAX,
    e2m1_codes,
    e2m1_values,
    pack_nibbles,
    round_e2m1,
    unpack_nibbles,
)
from compressor.numerics.fp8 import to_e4m3

_BLOCK = 16


class Nvfp4Codec(RowCodec):
    """D / 2 bytes of codes, then D / 16 block scales.

    Args:
        scale: the global scale, one positive fp32 number; None for 1.
        four_over_six: try for each block also the scale that puts its largest magnitude at 4 instead of 6,
            and keep it where the squared error is less.

    Raises:
        ValueError: a scale that is not one positive finite number.
    """

    kind = "nvfp4"

    def __init__(self, scale: torch.Tensor | None = None, *, four_over_six: bool = False) -> None:
        scale = torch.ones(()) if scale is None else scale.float()
        if scale.numel() != 1 or not bool((scale > 0) & scale.isfinite()):
            raise ValueError("an NVFP4 cache needs one positive scale")
        self._scale = scale.reshape(())
        self._four_over_six = four_over_six

    def slot_bytes(self, head_dim: int) -> int:
        """Codes and block scales."""
        return head_dim // 2 + head_dim // _BLOCK

    def problem(self, head_dim: int) -> str | None:
        """Blocks must fit."""
        return f"NVFP4 needs a multiple of {_BLOCK}, not {head_dim}" if head_dim % _BLOCK else None

    def encode_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """uint8 [N, S]."""
        blocks = torch.unflatten(x_ND.float(), 1, (-1, _BLOCK))
        codes, scales = self._blocks(blocks, E2M1_MAX)
        if self._four_over_six:
            others, other_scales = self._blocks(blocks, 4.0)
            better = self._error(blocks, others, other_scales) < self._error(blocks, codes, scales)
            codes = torch.where(better, others, codes)
            scales = torch.where(better, other_scales, scales)
        return torch.cat((pack_nibbles(codes.flatten(1)), scales.flatten(1)), dim=1)

    def decode_rows(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D]."""
        codes = torch.unflatten(unpack_nibbles(slots_NS[:, : head_dim // 2]), 1, (-1, _BLOCK))
        return self._read(codes, slots_NS[:, head_dim // 2 :].contiguous().unsqueeze(2)).flatten(1)

    def _blocks(self, x_NGB: torch.Tensor, at: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [N, G, 16] and scales [N, G, 1], both uint8, with the largest magnitude at ``at``."""
        scale = self._scale.to(x_NGB.device)
        most = x_NGB.abs().amax(dim=2, keepdim=True)
        stored = to_e4m3(most * (1.0 / at) / scale)
        step = stored.float() * scale
        inverse = torch.where(step > 0, 1.0 / step, 0.0)
        return e2m1_codes(round_e2m1(x_NGB * inverse)), stored.view(torch.uint8)

    def _read(self, codes_NGB: torch.Tensor, scales_NG1: torch.Tensor) -> torch.Tensor:
        step = scales_NG1.view(torch.float8_e4m3fn).float() * self._scale.to(codes_NGB.device)
        return e2m1_values(codes_NGB) * step

    def _error(self, x_NGB: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return (self._read(codes, scales) - x_NGB).square().sum(dim=2, keepdim=True)

    def options(self) -> Mapping[str, Any]:
        """Whether both scales are tried."""
        return {"four_over_six": self._four_over_six}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The global scale."""
        return {"scale": self._scale}
