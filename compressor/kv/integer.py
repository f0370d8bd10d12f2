"""Keys and values as 8-bit or 4-bit integers with a scale for each token and head, as vLLM 0.32 stores them.

vLLM keeps codes and scales of a page apart; here the scale follows its codes, the bytes are the same.
Legend: N rows (a token in one KV head), D head_dim, S bytes of a slot.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from compressor.kv.fp8 import LEAST_SCALE, token_scales
from compressor.kv.rows import RowCodec, as_bytes, divided, from_bytes
from compressor.numerics.fp4 import pack_nibbles, unpack_nibbles
from compressor.numerics.hadamard import fast_hadamard

_SCALE_BYTES = 4
_ZERO_POINT_MASK = 0xF
# vLLM's seed of the signs before its Hadamard transform.
_SIGN_SEED = 0x9E3779B9


class Int8TokenHeadCodec(RowCodec):
    """Symmetric int8, halves away from zero, then the scale: largest magnitude / 127, at least 1e-6.

    vLLM 0.32's ``int8_per_token_head`` (``v1/attention/ops/triton_reshape_and_cache_flash.py``).
    """

    kind = "int8_per_token_head"

    def slot_bytes(self, head_dim: int) -> int:
        """A byte an element, and the scale."""
        return head_dim + _SCALE_BYTES

    def encode_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """uint8 [N, D + 4]."""
        x = x_ND.float()
        scale = token_scales(x, 127.0)
        scaled = x * (1.0 / scale)
        codes = torch.where(scaled >= 0, scaled + 0.5, scaled - 0.5).clamp(-128, 127).to(torch.int8)
        return torch.cat((codes.view(torch.uint8), as_bytes(scale)), dim=1)

    def decode_rows(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D]."""
        codes = slots_NS[:, :head_dim].contiguous().view(torch.int8)
        return codes.float() * from_bytes(slots_NS[:, head_dim:], torch.float32)


class Int4TokenHeadCodec(RowCodec):
    """Random signs and a Hadamard transform, 4-bit codes with a zero point, then the scale in fp32.

    The transform is not normalized, runs over the largest power of two that divides D, and its result is
    rounded to the dtype that came in. The scale is a fifteenth of the range, at least 1e-6; the zero point,
    within 0 and 15, takes the place of the scale's lowest 4 mantissa bits after the codes are chosen. vLLM
    0.32's ``int4_per_token_head`` (``v1/attention/ops/int4_per_token_head.py``), with the transform of its
    CPU path: on CUDA it goes through bf16 tensor cores, so that single codes may differ by one step.
    """

    kind = "int4_per_token_head"

    def slot_bytes(self, head_dim: int) -> int:
        """Half a byte an element, and the scale."""
        return head_dim // 2 + _SCALE_BYTES

    def problem(self, head_dim: int) -> str | None:
        """Two codes share a byte."""
        return f"4-bit codes need an even head_dim, not {head_dim}" if head_dim % 2 else None

    def encode_rows(self, x_ND: torch.Tensor) -> torch.Tensor:
        """uint8 [N, D / 2 + 4]."""
        x = _rotate(x_ND.float()).to(x_ND.dtype).float()
        least, most = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        scale = divided(most - least, 15.0).clamp(min=LEAST_SCALE)
        zero_point = _to_code(-least / scale)
        codes = _to_code(x * (1.0 / scale) + zero_point).to(torch.uint8)
        bits = scale.view(torch.int32) & ~_ZERO_POINT_MASK | zero_point.to(torch.int32)
        return torch.cat((pack_nibbles(codes), as_bytes(bits)), dim=1)

    def decode_rows(self, slots_NS: torch.Tensor, head_dim: int) -> torch.Tensor:
        """fp32 [N, D]."""
        half = head_dim // 2
        bits = slots_NS[:, half:].contiguous().view(torch.int32)
        scale = (bits & ~_ZERO_POINT_MASK).view(torch.float32)
        codes = unpack_nibbles(slots_NS[:, :half]).float()
        return _rotate_back((codes - (bits & _ZERO_POINT_MASK).float()) * scale)


def _to_code(x: torch.Tensor) -> torch.Tensor:
    """fp32 whole numbers from 0 to 15: halves up; what is below zero becomes 0 as in vLLM's rounding."""
    return (x + 0.5).clamp(0, 15).floor()


def _block(head_dim: int) -> int:
    """The largest power of two that divides head_dim."""
    return head_dim & -head_dim


@lru_cache(maxsize=16)
def _signs(size: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(_SIGN_SEED)
    return 2.0 * torch.bernoulli(torch.full((size,), 0.5, device="cpu"), generator=generator) - 1.0


def _rotate(x_ND: torch.Tensor) -> torch.Tensor:
    block = _block(x_ND.shape[1])
    blocks = torch.unflatten(x_ND, 1, (-1, block)) * _signs(block).to(x_ND.device)
    return fast_hadamard(blocks).flatten(1)


def _rotate_back(x_ND: torch.Tensor) -> torch.Tensor:
    block = _block(x_ND.shape[1])
    blocks = fast_hadamard(torch.unflatten(x_ND, 1, (-1, block))) * _signs(block).to(x_ND.device)
    return (blocks / block).flatten(1)
