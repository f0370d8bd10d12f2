"""E2M1 rounding, codes and nibbles against the defining library."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

from compressor.numerics.fp4 import e2m1_codes, e2m1_values, pack_nibbles, round_e2m1, unpack_nibbles


def _probes() -> torch.Tensor:
    """Every tie and its neighbours in fp32, both signs, plus a dense sweep and random values."""
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.0, 2.5, 3.5, 4.0, 5.0, 6.0])
    near = torch.cat(
        [ties, ties.nextafter(torch.tensor(9.0)), ties.nextafter(torch.tensor(-9.0)).clamp(min=0)]
    )
    sweep = torch.arange(0, 6, 1 / 512)
    noise = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 6
    magnitudes = torch.cat([near.clamp(max=6.0), sweep, noise, torch.tensor([1e-30, 1e-45])])
    return torch.cat([magnitudes, -magnitudes])


def test_rounding_is_the_librarys() -> None:
    """Same values, and the same signs of zeros, as the library's own cast."""
    probes = _probes()
    expected = cast_to_fp4(probes.clone())
    rounded = round_e2m1(probes)
    assert torch.equal(rounded, expected)
    assert torch.equal(rounded.signbit(), expected.signbit())


@pytest.mark.parametrize(
    ("value", "expected"), [(5.0, 4.0), (5.0001, 6.0), (6.9, 6.0), (1e30, 6.0), (-7.0, -6.0)]
)
def test_saturation(value: float, expected: float) -> None:
    """What is beyond 6 becomes 6."""
    assert round_e2m1(torch.tensor([value])).item() == expected


def test_packing_is_the_librarys() -> None:
    """Codes and byte order are the library's, and unpacking gives the values back."""
    values = round_e2m1(_probes()[:8192].view(64, 128))
    packed = pack_nibbles(e2m1_codes(values))
    assert torch.equal(packed, pack_fp4_to_uint8(values.clone()))
    unpacked = e2m1_values(unpack_nibbles(packed))
    assert torch.equal(unpacked, values)
    assert torch.equal(unpacked, unpack_fp4_from_uint8(packed, 64, 128, dtype=torch.float32))


def test_an_odd_number_of_columns_is_a_bug() -> None:
    """Schemes refuse such shapes earlier."""
    with pytest.raises(AssertionError, match="odd"):
        pack_nibbles(torch.zeros(2, 3, dtype=torch.uint8))
