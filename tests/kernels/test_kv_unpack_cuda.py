"""The assembly that unpacks codes, run by a small interpreter of the few PTX instructions in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from compressor.kernels.kv_packed import Packed
from compressor.numerics.lloyd_max import gaussian_levels

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]
ALL = 0xFFFFFFFF


def _prmt(a: int, b: int, selector: int) -> int:
    """Generic mode: a nibble names a byte of b:a; with its highest bit set, only that byte's sign."""
    sources, found = a | b << 32, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = sources >> 8 * (nibble & 7) & 0xFF
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        found |= byte << 8 * i
    return found


def _lop3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def _numbers(register: int, dtype: torch.dtype) -> torch.Tensor:
    halves = [half - (1 << 16) if half >= 1 << 15 else half for half in (register & 0xFFFF, register >> 16)]
    return torch.tensor(halves, dtype=torch.int16).view(dtype)


def _register(numbers: torch.Tensor) -> int:
    low, high = (number & 0xFFFF for number in numbers.view(torch.int16).tolist())
    return low | high << 16


def _two(change: Callable[..., torch.Tensor], dtype: torch.dtype) -> Callable[..., int]:
    return lambda *registers: _register(change(*(_numbers(one, dtype) for one in registers)))


def _e4m3(pair: int) -> int:
    codes = torch.tensor([pair & 0xFF, pair >> 8 & 0xFF], dtype=torch.uint8)
    return _register(codes.view(torch.float8_e4m3fn).half())


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & ALL,
    "sub.u32": lambda a, b: (a - b) & ALL,
    "cvt.u16.u32": lambda a: a & 0xFFFF,
    "cvt.rn.f16x2.e4m3x2": _e4m3,
    "add.rn.f16x2": _two(torch.add, torch.float16),
    "add.rn.bf16x2": _two(torch.add, torch.bfloat16),
    "mul.rn.f16x2": _two(torch.mul, torch.float16),
    # products of fp16 are exact in fp32, and so is a sum of two within range but for its last rounding
    "fma.rn.f16x2": _two(lambda a, b, c: (a.double() * b.double() + c.double()).half(), torch.float16),
}


def _run(asm: str, registers: dict[str, int]) -> dict[str, int]:
    """The registers after the assembly."""
    for line in re.findall(r"[^{};]+", asm):
        words = line.replace(",", " ").split()
        if words and not words[0].startswith("."):
            values = [registers[word] if word in registers else int(word, 0) for word in words[2:]]
            registers[words[1]] = INSTRUCTIONS[words[0]](*values)
    return registers


FOUR, THREE = (Packed("codebook", bits, gaussian_levels(bits), True) for bits in (4, 3))
CASES = [
    (FOUR, 8, False),
    (FOUR, 4, False),
    (THREE, 8, False),
    (THREE, 4, False),
    (Packed("e4m3", 8), 4, False),
    (Packed("zero_point", 4), 8, False),
    (Packed("zero_point", 4), 8, True),
    (Packed("affine", 4), 4, True),
    (Packed("affine", 3), 8, True),
    (Packed("affine", 3), 4, True),
]


@pytest.mark.parametrize("side,places,values", CASES)
def test_unpacking(side: Packed, places: int, values: bool) -> None:
    """Every place of two random units, whatever lies above their codes."""
    unpack = import_module("compressor.kernels.kv_unpack_cuda")
    asm = unpack.assembly(side, places, values=values)
    dtype = torch.bfloat16 if values else torch.float16
    units = torch.randint(0, 1 << 32, (40, 2), generator=torch.Generator().manual_seed(places))
    for first, second in units.tolist():
        found = _run(asm, {f"${places}": first, f"${places + 1}": second})
        for place in range(places):
            codes = torch.tensor(
                [unit >> side.bits * place & (1 << side.bits) - 1 for unit in (first, second)]
            )
            if side.kind == "codebook":
                wanted = unpack.unit_levels(side.levels)[codes]
            elif side.kind == "e4m3":
                wanted = codes.to(torch.uint8).view(torch.float8_e4m3fn).half()
            else:
                wanted = (codes - (1 << side.bits) // 2).to(dtype)
            got = _numbers(found[f"${place}"], dtype)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("places", [4, 8])
def test_squares(places: int) -> None:
    """Sums of squares of two columns, rounded to fp16 at each step."""
    unpack = import_module("compressor.kernels.kv_unpack_cuda")
    x = (torch.randn(places, 2, generator=torch.Generator().manual_seed(3))).half()
    found = _run(unpack.squares(places), {f"${i + 1}": _register(x[i]) for i in range(places)})
    torch.testing.assert_close(
        _numbers(found["$0"], torch.float16).double(), x.double().square().sum(0), rtol=2e-3, atol=0
    )


def test_levels_that_are_not_symmetric() -> None:
    """Half of 16 levels is stored in the tables."""
    unpack = import_module("compressor.kernels.kv_unpack_cuda")
    with pytest.raises(ValueError, match="symmetric"):
        unpack.table_words(torch.linspace(-1, 2, 16))
