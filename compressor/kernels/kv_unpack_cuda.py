"""How the decode kernel turns packed codes into operands of the tensor cores, in registers.

A unit is a 32-bit integer with the codes of 4 or 8 neighbouring coordinates, the first in its lowest bits; a
tile [T, U] of units becomes one 16-bit tile for each place in the unit. On CUDA that is assembly for two
neighbouring units of a thread at once, whose outputs are the pairs that a matrix instruction takes: about one
instruction a code for evenly spaced levels, two and a half for a codebook, whose bytes ``prmt`` looks up. In
Triton's interpreter the same values come from plain operations.

Evenly spaced codes are centred (c - 8 or c - 4), so that sums of them cancel less.
Legend: T tokens, U units of one token, L levels of a codebook.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from compressor.kernels.kv_packed import Packed


def assembly(side: Packed, places: int, *, values: bool) -> str:
    """PTX for two units in, ``places`` registers of two 16-bit numbers out: bf16 values or fp16 keys."""
    first, second, bits = f"${places}", f"${places + 1}", side.bits
    if side.kind == "codebook":
        return _looked_up(side, places, first, second)
    if side.kind == "e4m3":
        lines = [
            f"prmt.b32 t, {first}, {second}, 0x00{4 + j}{j}; cvt.u16.u32 h, t; cvt.rn.f16x2.e4m3x2 ${j}, h;"
            for j in range(places)
        ]
        return _block([".reg .b32 t;", ".reg .b16 h;", *lines])
    # 128 + code in bf16, or 1024 + code in fp16, by setting bits; then less 128 or 1024 and the centre
    exponent, offset, kind_of = ("0x4300", "0xC3", "bf16x2") if values else ("0x6400", "0xE4", "f16x2")
    centre = (1 << bits) // 2
    negative = f"{offset}{centre:02X}"
    mask = f"{(1 << bits) - 1:04X}"
    lines = [".reg .b32 a, b, t, c;", f"mov.b32 c, {negative}{negative[2:]};"]
    lines.append(f"prmt.b32 a, {first}, {second}, 0x5410;")
    if places == 8:  # bits 16 to 31 of both, or 8 to 23 for 3 bits
        lines.append(f"prmt.b32 b, {first}, {second}, {'0x7632' if bits == 4 else '0x6521'};")
    for j in range(places):
        half, shift = ("a", bits * j) if j < 4 else ("b", bits * j - (16 if bits == 4 else 8))
        lines.append(f"shr.u32 t, {half}, {shift};")
        lines.append(f"lop3.b32 t, t, 0x{mask}{mask}, {exponent}{exponent[2:]}, 0xEA;")
        lines.append(f"add.rn.{kind_of} ${j}, t, c;")
    return _block(lines)


def _looked_up(side: Packed, places: int, first: str, second: str) -> str:
    """Bytes of levels by ``prmt``: its selectors have four codes, of two places in both units.

    For 3 bits the tables have all 8 levels; for 4 bits the 8 positive ones, and codes below 8 have theirs
    mirrored and a sign set.
    """
    bits = side.bits
    lines = [".reg .b32 r<4>, s<4>, w<4>, X, Y, t, m, z;"]
    lines += [f"mov.b32 w{i}, {word};" for i, word in enumerate(table_words(unit_levels(side.levels)))]
    if bits == 4:
        lines.append(f"prmt.b32 r0, {first}, {second}, 0x5140;")
        if places == 8:
            lines.append(f"prmt.b32 r2, {first}, {second}, 0x7362;")
        for i in range(0, places // 2, 2):
            lines.append(f"lop3.b32 m, r{i}, 0x88888888, 0, 0x0C; shr.u32 t, m, 3; sub.u32 t, m, t;")
            lines.append(f"lop3.b32 s{i}, r{i}, t, 0x77777777, 0x28;")
            lines.append(f"shr.u32 s{i + 1}, s{i}, 16; shr.u32 r{i + 1}, r{i}, 16;")
    else:
        for i in range(0, places // 2, 2):
            # 12 bits of each unit in its half of z, spread to nibbles, then brought together by twos
            if i == 0:
                lines.append(f"prmt.b32 z, {first}, {second}, 0x5410;")
            else:
                lines.append(f"prmt.b32 z, {first}, {second}, 0x6521; shr.u32 z, z, 4;")
            lines.append("shl.b32 t, z, 2; lop3.b32 z, z, t, 0x003F003F, 0xE4;")
            lines.append("shl.b32 t, z, 1; and.b32 t, t, 0x70707070; lop3.b32 z, z, 0x07070707, t, 0xEA;")
            lines.append(f"prmt.b32 s{i}, z, 0, 0x3120; shr.u32 s{i + 1}, s{i}, 16;")
    for i in range(places // 2):
        lines.append(f"prmt.b32 X, w0, w1, s{i}; prmt.b32 Y, w2, w3, s{i};")
        if bits == 4:  # 0xFF where the code has bit 3, else 0x80: shifted left, its complement is the sign
            lines.append(f"prmt.b32 t, 0x80808080, 0x80808080, r{i}; shl.b32 t, t, 1;")
            lines.append("lop3.b32 X, X, t, 0x80808080, 0xF2;")
        lines.append(f"prmt.b32 ${2 * i}, Y, X, 0x6240; prmt.b32 ${2 * i + 1}, Y, X, 0x7351;")
    return _block(lines)


def squares(places: int) -> str:
    """PTX for the sum of squares of ``places`` registers of two fp16 numbers."""
    lines = [".reg .b32 t;", "mul.rn.f16x2 t, $1, $1;"]
    lines += [f"fma.rn.f16x2 t, ${j}, ${j}, t;" for j in range(2, places + 1)]
    return _block([*lines, "mov.b32 $0, t;"])


def _block(lines: list[str]) -> str:
    return "{ " + "\n".join(lines) + " }"


@cache
def unit_levels(levels: tuple[float, ...], device: torch.device | None = None) -> torch.Tensor:
    """fp16 levels [L] with the largest about 2: their squares can be summed in fp16."""
    found = torch.tensor(levels or (1.0,), dtype=torch.float64)
    return (found * (2.0 / found.abs().max())).half().to(device)


def table_words(levels_L: torch.Tensor) -> list[str]:
    """Upper, then lower bytes of 8 fp16 levels as words; of 16 symmetric levels those of the upper 8.

    Raises:
        ValueError: 16 levels that are not symmetric.
    """
    half_L = levels_L.half()
    if len(half_L) == 16:
        if not torch.equal(half_L, -half_L.flip(0)):
            raise ValueError("16 levels of keys must be symmetric")
        half_L = half_L[8:]
    numbers = [number & 0xFFFF for number in half_L.view(torch.int16).tolist()]
    return [
        f"0x{sum((numbers[start + i] >> shift & 0xFF) << 8 * i for i in range(4)):08X}"
        for shift in (8, 0)
        for start in (0, 4)
    ]


@triton.jit
def _operand(x, levels, place: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    """One place of every unit without assembly."""
    code = (x >> (BITS * place)) & ((1 << BITS) - 1)
    if KIND == "codebook":
        value = tl.load(levels + code)
    elif KIND == "e4m3":
        value = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        value = (code - (1 << BITS) // 2).to(tl.float32)  # first: the interpreter has no int -> bf16
    return value.to(TYPE)


@triton.constexpr_function
def _times(one, count):
    return (one,) * count


@triton.jit
def operands(
    x,
    levels,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    PLACES: tl.constexpr,
    TYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """A tuple of PLACES tiles in TYPE, shaped as the units x. ASM is empty in the interpreter."""
    if ASM == "":
        k0, k1 = _operand(x, levels, 0, KIND, BITS, TYPE), _operand(x, levels, 1, KIND, BITS, TYPE)
        k2, k3 = _operand(x, levels, 2, KIND, BITS, TYPE), _operand(x, levels, 3, KIND, BITS, TYPE)
        if PLACES == 4:
            return k0, k1, k2, k3
        else:  # noqa: RET505 (Triton compiles what follows a return)
            k4, k5 = _operand(x, levels, 4, KIND, BITS, TYPE), _operand(x, levels, 5, KIND, BITS, TYPE)
            k6, k7 = _operand(x, levels, 6, KIND, BITS, TYPE), _operand(x, levels, 7, KIND, BITS, TYPE)
            return k0, k1, k2, k3, k4, k5, k6, k7
    else:
        types: tl.constexpr = _times(TYPE, PLACES)
        if PLACES == 4:
            return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r,r", [x], types, True, 2)
        else:  # noqa: RET505 (Triton compiles what follows a return)
            return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [x], types, True, 2)
