"""E4M3: saturation and the ladder of codes."""

from __future__ import annotations

import torch

from compressor.numerics.fp8 import E4M3_CODES, e4m3_ladder, to_e4m3


def test_saturates_where_a_bare_cast_gives_nan() -> None:
    """Values beyond 448 become 448, with their sign."""
    big = torch.tensor([1e6, -1e6, 500.0, 448.0])
    assert to_e4m3(big).float().tolist() == [448.0, -448.0, 448.0, 448.0]


def test_ladder_follows_the_format() -> None:
    """Codes 1 to 126 are (1 + m/8) 2**(e - 7), subnormal m/8 2**-6, ascending to 448."""
    ladder = e4m3_ladder()
    assert len(ladder) == E4M3_CODES + 1
    expected = [
        mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
    ]
    assert ladder.tolist() == expected[:127]
    assert ladder[1] == 2.0**-9
    assert ladder[126] == 448.0
