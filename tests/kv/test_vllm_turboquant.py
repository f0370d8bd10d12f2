"""vLLM's TurboQuant presets against plain loops; tests/kv/test_golden.py has vLLM's own bytes."""

from __future__ import annotations

import math
import struct
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open

from compressor.kv.vllm_turboquant import VllmTurboKeyCodec, VllmTurboValueCodec, vllm_levels
from compressor.numerics.hadamard import sylvester
from compressor.numerics.lloyd_max import gaussian_levels
from tests.kv.golden import FILE


def _row(width: int, seed: int = 0) -> torch.Tensor:
    return 5 * torch.randn(1, 1, 1, width, generator=torch.Generator().manual_seed(seed))


def _packed(codes: list[int], bits: int) -> bytes:
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    return number.to_bytes(len(codes) * bits // 8, "little")


@pytest.mark.parametrize("bits", [3, 4])
def test_key_step_by_step(bits: int) -> None:
    """Norm, Hadamard / sqrt(D), the number of midpoints reached, fp16 norm."""
    x = _row(64)
    norm = float(x.double().norm())
    y = (x.double().flatten() / norm @ sylvester(64).double() / 8).tolist()
    levels = vllm_levels(64, bits).double().tolist()
    between = [(low + high) / 2 for low, high in pairwise(levels)]
    codes = [sum(value >= middle for middle in between) for value in y]
    expected = _packed(codes, bits) + struct.pack("<e", norm)
    codec = VllmTurboKeyCodec(bits)
    slots = codec.encode(x)
    assert bytes(slots.flatten().tolist()) == expected
    read = torch.tensor([levels[code] for code in codes]).double()
    read = read / read.norm() * struct.unpack("<e", expected[-2:])[0]
    decoded = codec.decode(slots, 64, torch.float32)
    torch.testing.assert_close(
        decoded.flatten().double(), read @ sylvester(64).double() / 8, rtol=0, atol=1e-4
    )
    # Norm correction: what is read has exactly the stored norm.
    assert float(decoded.norm()) == pytest.approx(struct.unpack("<e", expected[-2:])[0], rel=1e-5)


@pytest.mark.parametrize("bits", [3, 4])
def test_value_step_by_step(bits: int) -> None:
    """Least value, step, codes by truncation; step and least value in fp16 behind them."""
    x = _row(64)
    row = x.flatten().tolist()
    most = (1 << bits) - 1
    step = (max(row) - min(row)) / most
    codes = [min(int((value - min(row)) / step + 0.5), most) for value in row]
    expected = _packed(codes, bits) + struct.pack("<ee", step, min(row))
    codec = VllmTurboValueCodec(bits)
    slots = codec.encode(x)
    assert bytes(slots.flatten().tolist()) == expected
    read_step, read_least = struct.unpack("<ee", expected[-4:])
    read = torch.tensor([code * read_step + read_least for code in codes])
    torch.testing.assert_close(codec.decode(slots, 64, torch.float32).flatten(), read, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_dim", [16, 64, 128, 512])
@pytest.mark.parametrize("bits", [3, 4])
def test_levels_are_nearly_exact(bits: int, head_dim: int) -> None:
    """vLLM's solver stays within 0.002 standard deviations of the exact codebook, and symmetric."""
    levels = vllm_levels(head_dim, bits)
    exact = torch.tensor(gaussian_levels(bits))
    torch.testing.assert_close(levels * math.sqrt(head_dim), exact, rtol=0, atol=0.002)
    assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("head_dim", [0, 4, 96, 160])
def test_widths_that_hadamard_has_not(head_dim: int) -> None:
    """Refused with the reason."""
    assert "power of two" in str(VllmTurboKeyCodec(4).problem(head_dim))


def test_faults() -> None:
    """Only the widths of the presets exist; codes fill whole bytes."""
    with pytest.raises(ValueError, match="3 or 4 bits, not 2"):
        VllmTurboKeyCodec(2)
    with pytest.raises(ValueError, match="3 or 4 bits, not 8"):
        VllmTurboValueCodec(8)
    assert "multiple of 8" in str(VllmTurboValueCodec(3).problem(12))
    assert VllmTurboValueCodec(4).problem(12) is None


def test_golden_file_says_where_it_is_from() -> None:
    """Made by vLLM 0.32's kernels, and small."""
    with safe_open(FILE, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["vllm"].startswith("0.32.")
    assert set(metadata) == {"vllm", "triton", "torch", "ran_on"}
    assert FILE.stat().st_size < 300_000
