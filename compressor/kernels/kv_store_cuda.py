"""Triton twins of the codecs that ``kv_decode_cuda`` reads: the same bytes as the codecs compute on the CPU.

Norms are summed in fp64 and rotated by butterflies in a fixed order, divisions round to nearest, and no
product and sum become one. (PyTorch's own division of a CUDA tensor by a number multiplies by the inverse:
run on CUDA, the codecs themselves may differ in single codes.)

Legend: N rows (a token in one KV head), R rows of one tile, D head_dim, S bytes of a slot.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from compressor.kernels.hadamard_cuda import hadamard
from compressor.kernels.kv_packed import Packed
from compressor.numerics.hadamard import is_power_of_two

VALUES_OF_A_TILE = 2048
LEAST_NORM = tl.constexpr(1e-8)
LEAST_AFFINE_STEP = tl.constexpr(1e-8)
LEAST_STEP = tl.constexpr(1e-6)


@triton.jit
def _store_codes(codes, slots, inside, BITS: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """Codes [R, D] from the first byte of each slot on, lowest bits first."""
    if BITS == 4:
        low, high = tl.split(tl.reshape(codes, [R, D // 2, 2]))
        place = tl.arange(0, D // 2)[None, :]
        tl.store(slots[:, None] + place, (low | high << 4).to(tl.uint8), mask=inside[:, None])
    else:
        places = tl.reshape(codes, [R, D // 8, 8]) << (tl.arange(0, 8) * 3)[None, None, :]
        group = tl.sum(places, axis=2)
        place = slots[:, None] + tl.arange(0, D // 8)[None, :] * 3
        tl.store(place, (group & 0xFF).to(tl.uint8), mask=inside[:, None])
        tl.store(place + 1, (group >> 8 & 0xFF).to(tl.uint8), mask=inside[:, None])
        tl.store(place + 2, (group >> 16).to(tl.uint8), mask=inside[:, None])


@triton.jit
def _code(x, MOST: tl.constexpr):
    """Whole numbers from 0 to MOST, halves up."""
    return tl.minimum(tl.maximum(x + 0.5, 0.0), MOST).to(tl.int32)


@triton.jit
def _codebook(x, between, after, inside, factor, BITS: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
              STEPS: tl.constexpr):  # fmt: skip
    """Codes of rotated unit vectors; stores the norms."""
    wide = x.to(tl.float64)
    norm = tl.sqrt(tl.sum(wide * wide, axis=1)).to(tl.float32)
    y = hadamard(tl.div_rn(x, (norm + LEAST_NORM)[:, None] + tl.zeros_like(x)), R, D, STEPS) * factor
    codes = tl.zeros([R, D], tl.int32)
    for level in tl.static_range((1 << BITS) - 1):
        codes += (y >= tl.load(between + level)).to(tl.int32)
    tl.store(after.to(tl.pointer_type(tl.float16)), norm.to(tl.float16), mask=inside)
    return codes


@triton.jit
def _affine(x, after, inside, BITS: tl.constexpr):
    """Codes between least and largest value; stores step and least value."""
    MOST: tl.constexpr = (1 << BITS) - 1
    least = tl.min(x, axis=1)
    span = tl.max(x, axis=1) - least
    step = tl.maximum(tl.div_rn(span, tl.zeros_like(span) + MOST), LEAST_AFFINE_STEP)
    half = after.to(tl.pointer_type(tl.float16))
    tl.store(half, step.to(tl.float16), mask=inside)
    tl.store(half + 1, least.to(tl.float16), mask=inside)
    return _code(tl.div_rn(x - least[:, None], step[:, None] + tl.zeros_like(x)), MOST)


@triton.jit
def _zero_point(x, after, inside):
    """4-bit codes around a zero point; stores the step with the zero point in its lowest bits."""
    least = tl.min(x, axis=1)
    span = tl.max(x, axis=1) - least
    step = tl.maximum(tl.div_rn(span, tl.zeros_like(span) + 15.0), LEAST_STEP)
    zero = _code(tl.div_rn(-least, step), 15)
    bits = step.to(tl.int32, bitcast=True) & -16 | zero
    tl.store(after.to(tl.pointer_type(tl.int32)), bits, mask=inside)
    inverse = tl.div_rn(tl.zeros_like(step) + 1.0, step)
    return _code(x * inverse[:, None] + zero.to(tl.float32)[:, None], 15)


@triton.jit
def _rounded(x, TYPE: tl.constexpr):
    """fp32 values of another type, ties to even; by bits, since the interpreter cuts off for bf16."""
    if tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + (bits >> 16 & 1) & -0x10000).to(tl.float32, bitcast=True)
    elif tl.float16 == TYPE:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _store(x_ND, signs_D, between, slots_NS, rows, factor, KIND: tl.constexpr, BITS: tl.constexpr,
           R: tl.constexpr, D: tl.constexpr, S: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside, d = n < rows, tl.arange(0, D)[None, :]
    x = tl.load(x_ND + n[:, None] * D + d, mask=inside[:, None], other=0.0).to(tl.float32)
    slots = slots_NS + n * S
    after = slots + D * BITS // 8
    if KIND == "codebook":
        codes = _codebook(x, between, after, inside, factor, BITS, R, D, STEPS)
    elif KIND == "affine":
        codes = _affine(x, after, inside, BITS)
    else:
        x = hadamard(x * tl.load(signs_D + d), R, D, STEPS)
        codes = _zero_point(_rounded(x, x_ND.dtype.element_ty), after, inside)
    _store_codes(codes, slots, inside, BITS, R, D)


def encode(x_BHTD: torch.Tensor, side: Packed) -> torch.Tensor:
    """uint8 slots [B, H, T, S] of keys or values in fp32, bf16 or fp16; D is a power of two, at least 16."""
    head_dim = x_BHTD.shape[-1]
    assert side.kind != "e4m3", "a cast, for which PyTorch has a kernel"
    assert is_power_of_two(head_dim), head_dim
    size, rows = side.slot_bytes(head_dim), x_BHTD.numel() // head_dim
    slots_BHTS = torch.empty(*x_BHTD.shape[:-1], size, dtype=torch.uint8, device=x_BHTD.device)
    tile = max(1, VALUES_OF_A_TILE // head_dim)
    if rows:
        _store[(triton.cdiv(rows, tile),)](
            x_BHTD.contiguous(), _kept(side.signs, x_BHTD.device), _between(side.levels, x_BHTD.device),
            slots_BHTS, rows, side.factor, side.kind, side.bits, tile, head_dim, size,
            head_dim.bit_length() - 1, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return slots_BHTS


@cache
def _between(levels: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """fp32 midpoints of fp32 levels."""
    found = torch.tensor(levels or (0.0,))
    return ((found[:-1] + found[1:]) / 2).to(device)


@cache
def _kept(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers or (0.0,), device=device)
