"""int8 and int4 caches against plain loops; tests/kv/test_golden.py compares them with vLLM's kernels."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from compressor.kv.integer import Int4TokenHeadCodec, Int8TokenHeadCodec
from compressor.numerics.hadamard import sylvester
from tests.kv.golden import HEAD_DIMS, PLAIN, as_cache, golden


def _row(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 1, 1, width, generator=torch.Generator().manual_seed(seed))


def test_int8_by_hand() -> None:
    """Halves away from zero: 127 is the largest, 0.5 and -0.5 of a step become 1 and -1."""
    x = torch.tensor([127.0, 0.5, -0.5, 0.49, -126.5]).reshape(1, 1, 1, 5)
    slots = Int8TokenHeadCodec().encode(x).flatten()
    assert slots[:5].view(torch.int8).tolist() == [127, 1, -1, 0, -127]
    assert bytes(slots[5:].tolist()) == struct.pack("<f", 1.0)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_int4_step_by_step(head_dim: int) -> None:
    """Signs, Hadamard in blocks, range, zero point, codes and the scale's low bits, in fp64 and loops."""
    x = _row(head_dim)
    block = head_dim & -head_dim
    generator = torch.Generator().manual_seed(0x9E3779B9)  # vLLM's
    signs = [1 if flip else -1 for flip in torch.bernoulli(torch.full((block,), 0.5), generator=generator)]
    turn = torch.diag(torch.tensor(signs).double()) @ sylvester(block).double()
    y = (x.double().reshape(-1, block) @ turn).flatten().tolist()
    scale = (max(y) - min(y)) / 15
    zero_point = min(max(math.floor(-min(y) / scale + 0.5), 0), 15)
    codes = [min(max(math.floor(value / scale + zero_point + 0.5), 0), 15) for value in y]
    slots = Int4TokenHeadCodec().encode(x).flatten().tolist()
    assert slots[: head_dim // 2] == [
        low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)
    ]
    (bits,) = struct.unpack("<I", bytes(slots[head_dim // 2 :]))
    (stored,) = struct.unpack("<f", struct.pack("<I", bits & ~15))
    assert bits & 15 == zero_point
    assert stored == pytest.approx(scale, rel=2**-19)  # 23 bits of mantissa less 4, and fp32's rounding
    rotated = torch.tensor([(code - zero_point) * stored for code in codes]).double().reshape(-1, block)
    expected = (rotated @ turn.T / block).flatten()
    read = Int4TokenHeadCodec().decode(Int4TokenHeadCodec().encode(x), head_dim, torch.float32)
    torch.testing.assert_close(read.flatten().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_int4_attention_is_vllms(head_dim: int) -> None:
    """Attention over what is decoded, against vLLM's kernel, which reads codes and rotated queries."""
    codec = Int4TokenHeadCodec()
    keys, values = (
        codec.decode(
            as_cache(golden()[f"{head_dim}/int4_per_token_head/{side}"])[:, :, :PLAIN],
            head_dim,
            torch.float32,
        )
        for side in ("key", "value")
    )
    query = golden()[f"{head_dim}/query"].float().transpose(0, 1)[None]
    attended = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    expected = golden()[f"{head_dim}/int4_per_token_head/attention"]
    torch.testing.assert_close(attended[0, :, 0], expected[0], rtol=1e-3, atol=1e-3)


def test_odd_widths_are_refused() -> None:
    """Two codes share a byte."""
    assert "even head_dim" in str(Int4TokenHeadCodec().problem(63))
