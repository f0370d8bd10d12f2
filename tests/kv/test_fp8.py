"""e4m3 caches: scales of a tensor, of heads, and of tokens."""

from __future__ import annotations

import struct

import pytest
import torch

from compressor.kv.fp8 import Fp8Codec, Fp8TokenHeadCodec


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_scales_of_heads() -> None:
    """Each head by its own scale, as if it were alone."""
    x = _normal(2, 3, 4, 16) * torch.tensor([1.0, 100.0, 1e4]).reshape(1, 3, 1, 1)
    scales = torch.tensor([0.01, 1.0, 100.0])
    slots = Fp8Codec(scales).encode(x)
    for head in range(3):
        alone = Fp8Codec(scales[head]).encode(x[:, head : head + 1])
        assert torch.equal(slots[:, head : head + 1], alone)
    read = Fp8Codec(scales).decode(slots, 16, torch.float32)
    # e4m3 has 4 significant bits; below its least normal number, 2^-6 times the scale, steps stay the same.
    torch.testing.assert_close(read, x, rtol=2**-4, atol=100 * 2**-10)


def test_rounding_and_saturation() -> None:
    """Ties to even, and what is too large becomes 448 rather than NaN."""
    x = torch.tensor([17.0, 19.0, 448.0, 470.0, 1e6, -1e6, 0.0, 2.0**-10]).reshape(1, 1, 1, 8)
    read = Fp8Codec().decode(Fp8Codec().encode(x), 8, torch.float32)
    assert read.flatten().tolist() == [16.0, 20.0, 448.0, 448.0, 448.0, -448.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_faulty_scales(scale: float) -> None:
    """A plan's file may hold anything."""
    with pytest.raises(ValueError, match="positive scale"):
        Fp8Codec(torch.tensor([1.0, scale]))


def test_shapes_of_scales() -> None:
    """A scale for each KV head or one for all."""
    with pytest.raises(ValueError, match="positive scale"):
        Fp8Codec(torch.ones(1, 2))
    codec = Fp8Codec(torch.ones(2))
    with pytest.raises(ValueError, match="2 scales for 3 KV heads"):
        codec.encode(torch.zeros(1, 3, 1, 8))


def test_scale_of_a_token() -> None:
    """The largest magnitude becomes 448; the scale stands behind the codes, little-endian."""
    x = torch.tensor([1.0, -2.0, 0.5, 0.0]).reshape(1, 1, 1, 4)
    slots = Fp8TokenHeadCodec().encode(x).flatten()
    assert slots[:4].view(torch.float8_e4m3fn).float().tolist() == [224.0, -448.0, 112.0, 0.0]
    assert bytes(slots[4:].tolist()) == struct.pack("<f", 2 / 448)
