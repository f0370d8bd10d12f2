"""The NVFP4 cache against plain loops over blocks."""

from __future__ import annotations

import pytest
import torch

from compressor.kv.nvfp4 import Nvfp4Codec
from compressor.numerics.fp4 import E2M1_VALUES, pack_nibbles
from compressor.numerics.fp8 import to_e4m3


def _block(values: list[float], scale: float, largest: float) -> tuple[list[int], int, float]:
    """Codes, the block scale's byte and the squared error, with the largest magnitude at ``largest``."""
    stored = to_e4m3(torch.tensor(max(map(abs, values)) / largest / scale))
    step = float(stored) * scale
    codes, error = [], 0.0
    for value in values:
        # Even codes win ties, as in the instruction that rounds to e2m1.
        code = min(range(8), key=lambda code: (abs(E2M1_VALUES[code] - abs(value) / step), code % 2))
        codes.append(code | 8 if value < 0 else code)
        error += (E2M1_VALUES[code] * step - abs(value)) ** 2
    return codes, int(stored.view(torch.uint8)), error


@pytest.mark.parametrize("scale", [1.0, 0.03])
@pytest.mark.parametrize("four_over_six", [False, True])
def test_blocks_one_by_one(four_over_six: bool, scale: float) -> None:
    """Codes, then block scales, with the better of two scales where both are tried."""
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    codec = Nvfp4Codec(torch.tensor(scale), four_over_six=four_over_six)
    slots = codec.encode(x.reshape(1, 1, 20, 32))[0, 0]
    fours = 0
    for row, slot in zip(x.tolist(), slots.tolist(), strict=True):
        codes, scales = [], []
        for start in (0, 16):
            found = _block(row[start : start + 16], scale, 6.0)
            other = _block(row[start : start + 16], scale, 4.0)
            if four_over_six and other[2] < found[2]:
                found, fours = other, fours + 1
            codes += found[0]
            scales.append(found[1])
        assert slot == [*pack_nibbles(torch.tensor(codes, dtype=torch.uint8)).tolist(), *scales]
    assert (fours > 0) == four_over_six


def test_read() -> None:
    """Levels times block scale times global scale."""
    codec = Nvfp4Codec(torch.tensor(0.5))
    x = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2).reshape(1, 1, 1, 16)
    assert torch.equal(codec.decode(codec.encode(x), 16, torch.float32), x)


def test_faults() -> None:
    """A plan's file may hold anything; blocks have 16 values."""
    for wrong in (torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2)):
        with pytest.raises(ValueError, match="one positive scale"):
            Nvfp4Codec(wrong)
    assert "multiple of 16" in str(Nvfp4Codec().problem(72))
