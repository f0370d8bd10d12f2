"""E8M0 codes against the defining library."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale, decompress_mx_scale

from compressor.numerics.mx import e8m0_codes, e8m0_values


def test_every_power_of_two_round_trips() -> None:
    """2**-127 (subnormal in fp32) to 2**127, as the library stores and reads them."""
    exponents = torch.arange(-127, 128)
    powers = torch.pow(torch.tensor(2.0, dtype=torch.float64), exponents.double()).float()
    codes = e8m0_codes(powers)
    assert torch.equal(codes, (exponents + 127).to(torch.uint8))
    assert torch.equal(codes, compress_mx_scale(powers, torch.uint8))
    assert torch.equal(e8m0_values(codes), powers)
    assert torch.equal(decompress_mx_scale(codes).float(), powers)
