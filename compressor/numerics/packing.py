"""Signed integers of 4 or 8 bits packed into int32 words, least significant bits first.

Layout of ``compressed_tensors@0.19 compressors/pack_quantized/helpers.py`` for these two widths: values are
stored with an offset of half their range, padding is zero. Legend: O rows, I columns.
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
