"""Integers packed into int32 words (4 or 8 bits) or into bytes (1 to 4 bits), least significant bits first.

Layout of the words: ``compressed_tensors@0.19 compressors/pack_quantized/helpers.py`` for these two widths:
values are stored with an offset of half their range, padding is zero. Legend: O rows, I columns.
"""

from __future__ import annotations

import torch

from compressor.numerics.fp4 import pack_nibbles, unpack_nibbles


def pack_int32(values: torch.Tensor, bits: int, *, dim: int = 1) -> torch.Tensor:
    """int8 [O, I] -> int32 with dimension ``dim`` shortened to ``ceil(bits * length / 32)``."""
    assert bits in (4, 8), "only 4 and 8 bits are packed here"
    if dim == 0:
        return pack_int32(values.T, bits).T.clone(memory_format=torch.contiguous_format)
    per_word = 32 // bits
    codes = (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    padding = -codes.shape[1] % per_word
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    as_bytes = pack_nibbles(codes) if bits == 4 else codes
    # flat: a single row may have a stride that cannot be viewed as words
    return as_bytes.flatten().view(torch.int32).view(len(values), -1)


def unpack_int32(words: torch.Tensor, bits: int, length: int, *, dim: int = 1) -> torch.Tensor:
    """The inverse of ``pack_int32``: int8 with ``length`` entries along ``dim``."""
    assert bits in (4, 8), "only 4 and 8 bits are packed here"
    if dim == 0:
        return unpack_int32(words.T, bits, length).T
    as_bytes = words.flatten().view(torch.uint8).view(len(words), -1)
    codes = unpack_nibbles(as_bytes) if bits == 4 else as_bytes
    return (codes[:, :length].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., N] below ``2**bits`` -> bytes [..., N * bits / 8], a stream of bits, lowest first.

    1, 2 and 4 bits fill each byte from its low end; 8 codes of 3 bits fill three bytes. N * bits must be a
    multiple of 8, and for 3 bits N of 8. The layout of vLLM's TurboQuant cache.
    """
    if bits == 4:
        return pack_nibbles(codes)
    if bits == 3:
        c = torch.unflatten(codes, -1, (-1, 8)).unbind(-1)
        low = c[0] | c[1] << 3 | c[2] << 6
        middle = c[2] >> 2 | c[3] << 1 | c[4] << 4 | c[5] << 7
        high = c[5] >> 1 | c[6] << 2 | c[7] << 5
        return torch.stack((low, middle, high), dim=-1).flatten(-2)
    assert bits in (1, 2), "codes of 1 to 4 bits are packed here"
    first, *others = torch.unflatten(codes, -1, (-1, 8 // bits)).unbind(-1)
    packed = first.clone()
    for place, code in enumerate(others, start=1):
        packed |= code << (place * bits)
    return packed


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [..., M] -> uint8 codes [..., 8 * M / bits], the inverse of ``pack_bits``."""
    if bits == 4:
        return unpack_nibbles(packed)
    if bits == 3:
        low, middle, high = torch.unflatten(packed, -1, (-1, 3)).unbind(-1)
        codes = (
            low & 7,
            low >> 3 & 7,
            low >> 6 | (middle & 1) << 2,
            middle >> 1 & 7,
            middle >> 4 & 7,
            middle >> 7 | (high & 3) << 1,
            high >> 2 & 7,
            high >> 5,
        )
        return torch.stack(codes, dim=-1).flatten(-2)
    assert bits in (1, 2), "codes of 1 to 4 bits are packed here"
    mask = (1 << bits) - 1
    return torch.stack([packed >> shift & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
