"""int32 packing against the defining library, packing of bits against one long integer."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.numerics.packing import pack_bits, pack_int32, unpack_bits, unpack_int32


def _values(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_words_are_the_librarys(rows: int, columns: int, bits: int, dim: int, seed: int) -> None:
    """Same words for any shape, padding included, and both unpackings agree."""
    values = _values(rows, columns, bits, seed)
    packed = pack_int32(values, bits, dim=dim)
    assert torch.equal(packed, pack_to_int32(values, bits, packed_dim=dim))
    unpacked = unpack_int32(packed, bits, (rows, columns)[dim], dim=dim)
    assert torch.equal(unpacked, values)
    assert torch.equal(unpacked, unpack_from_int32(packed, bits, values.shape, packed_dim=dim))


def test_layout() -> None:
    """The first value is in the lowest bits, with an offset of 8."""
    values = torch.tensor([[-8, 7, 0, -8, -8, -8, -8, -8]], dtype=torch.int8)
    assert pack_int32(values, 4).item() == 0x8F0


def test_other_widths_are_a_bug() -> None:
    """Only 4 and 8 bits exist here."""
    with pytest.raises(AssertionError, match="4 and 8"):
        pack_int32(torch.zeros(1, 8, dtype=torch.int8), 3)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    eights=st.integers(1, 20),
    bits=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 99),
)
def test_bits_are_one_long_integer(rows: int, eights: int, bits: int, seed: int) -> None:
    """Each row is the integer of its codes, the first lowest, written little-endian; and back."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, 8 * eights), generator=generator, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(row))
        assert bytes(stored) == number.to_bytes(bits * eights, "little")
    assert torch.equal(unpack_bits(packed, bits), codes)


def test_packing_leaves_codes_alone() -> None:
    """Codes may be a view of something that is needed later."""
    for bits in (1, 2, 3, 4):
        codes = torch.full((2, 8), (1 << bits) - 1, dtype=torch.uint8)
        pack_bits(codes, bits)
        assert bool((codes == (1 << bits) - 1).all())
