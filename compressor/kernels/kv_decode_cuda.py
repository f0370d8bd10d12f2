"""Attention of one new token a sequence over packed keys and values, decoded in registers (Triton, CUDA).

Split-K, as flash-decoding: each program reads one run of tokens of one KV head for all its query heads, and
a last kernel puts the runs together. The query is rotated once, so that keys are read in the basis that they
are stored in; a rotation of the values is undone on the sum. One warp a program: a tile never leaves its
registers, but for packed words on their way to the lanes that need them.

Products are of fp16 (query and keys) and of bf16 (probabilities and values), sums and the softmax fp32.

Legend: B sequences, H KV heads, G query heads of one KV head, M = G padded, T tokens of a tile, U units of a
token, D head_dim, S bytes of a slot, R runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from compressor.kernels import kv_unpack_cuda as unpack
from compressor.kernels.hadamard_cuda import hadamard
from compressor.kernels.kv_packed import Packed
from compressor.kernels.kv_unpack_cuda import operands

TILE = 32  # tokens: a larger tile needs more registers than a thread has
PROGRAMS_OF_A_PROCESSOR = 8  # as many as registers allow at once; runs are made as long as this asks
SHORTEST_RUN = 128  # tokens
STAGES = 3  # tiles on their way from memory, and the one that is read
HEAD_DIMS = (64, 128, 256)
MOST_GROUP = 32  # query heads of a KV head

_LOG2_E = 1.4426950408889634
_LEAST_QUERY = tl.constexpr(1e-30)
_NONE = tl.constexpr(-(2**31 - 1))


@triton.jit
def _prepare(q_BHGD, signs_D, q_BHPUM, scale_BHM, sum_BHM, scale, factor, G: tl.constexpr, M: tl.constexpr,
             D: tl.constexpr, STEPS: tl.constexpr, PLACES: tl.constexpr, ROTATED: tl.constexpr,
             SIGNED: tl.constexpr):  # fmt: skip
    """Rotated queries over their largest magnitude in fp16, by place and unit; their scales; their sums."""
    head = tl.program_id(0).to(tl.int64)
    m, d = tl.arange(0, M)[:, None], tl.arange(0, D)[None, :]
    q = tl.load(q_BHGD + (head * G + m) * D + d, mask=m < G, other=0.0).to(tl.float32)
    if SIGNED:
        q *= tl.load(signs_D + d)
    if ROTATED:
        q = hadamard(q, M, D, STEPS) * factor
    most = tl.maximum(tl.max(tl.abs(q), axis=1), _LEAST_QUERY)
    rounded = (q / most[:, None]).to(tl.float16)
    place, unit = d % PLACES, d // PLACES
    tl.store(q_BHPUM + (head * D + place * (D // PLACES) + unit) * M + m, rounded)
    row = head * M + tl.arange(0, M)
    tl.store(scale_BHM + row, most * scale)
    tl.store(sum_BHM + row, tl.sum(rounded.to(tl.float32), axis=1))


@triton.jit
def _half(address):
    return address.to(tl.pointer_type(tl.float16))


@triton.jit
def _word(address):
    return address.to(tl.pointer_type(tl.int32))


@triton.jit
def _loaded(pointer, inside, MASKED: tl.constexpr):
    if MASKED:
        found = tl.load(pointer, mask=inside, other=0)
    else:
        found = tl.load(pointer)
    return found


@triton.jit
def _shifts(
    any_word, length, odd, S: tl.constexpr, U: tl.constexpr, UNIT_BITS: tl.constexpr, T: tl.constexpr
):
    """How far units lie from the low ends of their words: by token of a tile, and by unit, to be added.

    No word is loaded: the mask never holds. The compiler moves a conversion between layouts up to the loads
    that feed it only where all it meets on the way are loads and constants; were it not for this, it would
    convert unpacked codes instead of packed words.
    """
    t, u = tl.arange(0, T), tl.arange(0, U)
    by_token = tl.load(any_word + t, mask=t < length + _NONE, other=((t & 1) * S + odd) * 8)
    by_unit = tl.load(any_word + u, mask=u < length + _NONE, other=u * UNIT_BITS)
    return by_token, by_unit


@triton.jit
def _units(base, n, end, odd, by_token, by_unit, S: tl.constexpr, U: tl.constexpr, UNIT_BITS: tl.constexpr,
           T: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """int32 [T, U]: the units of tokens n to n + T, in the low bits; n is even.

    Slots start at even addresses: a pair of tokens at a multiple of 4 from the first, ``odd`` bytes after it.
    Constants apart from what a lane adds, so that loads have constant offsets.
    """
    i = tl.arange(0, T // 2)[:, None, None]
    t = tl.arange(0, 2)[None, :, None]
    u = tl.arange(0, U)[None, None, :]
    bit = (t * S + odd) * 8 + u * UNIT_BITS
    lane = _word(base - odd) + (n >> 1) * (S // 2) + (bit >> 5)
    inside = n + 2 * i + t < end
    x = tl.reshape(_loaded(lane + i * (S // 2), inside, MASKED), [T, U])
    if S % 4 != 0 or UNIT_BITS != 32:
        shift = by_token[:, None] + by_unit[None, :]
        upper = x
        if UNIT_BITS == 32 or UNIT_BITS == 24 or UNIT_BITS == 12:  # some units lie in two words
            across = (bit & 31) + UNIT_BITS > 32
            upper = tl.reshape(_loaded(lane + i * (S // 2) + 1, inside & across, MASKED), [T, U])
        wide = (upper.to(tl.uint32).to(tl.uint64) << 32) | x.to(tl.uint32).to(tl.uint64)
        x = (wide >> (shift & 31).to(tl.uint64)).to(tl.int32)
    return x


@triton.jit
def _dots(first, second, PLACES: tl.constexpr):
    """Sum over places of ``first[i] @ second[i]``."""
    s = tl.dot(first[0], second[0])
    for place in tl.static_range(1, PLACES):
        s = tl.dot(first[place], second[place], s)
    return s


@triton.jit
def _squares(k, ASM: tl.constexpr, PLACES: tl.constexpr):
    """Sum over places of squares, in fp16."""
    if ASM == "":
        total = k[0] * k[0]
        for place in tl.static_range(1, PLACES):
            total += k[place] * k[place]
    elif PLACES == 4:
        total = tl.inline_asm_elementwise(ASM, "=r,r,r,r,r", [k[0], k[1], k[2], k[3]], tl.float16, True, 2)
    else:
        total = tl.inline_asm_elementwise(
            ASM, "=r,r,r,r,r,r,r,r,r", [k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]], tl.float16, True, 2
        )
    return total


@triton.jit
def _zero_point(address, inside, MASKED: tl.constexpr, CENTRE: tl.constexpr):
    """Step, and what a centred code of zero stands for."""
    bits = _loaded(_word(address), inside, MASKED)
    step = (bits & -16).to(tl.float32, bitcast=True)
    return step, step * (CENTRE - (bits & 15).to(tl.float32))


@triton.jit
def _scores(q, sums, levels, base, n, end, odd, by_token, by_unit, inside, M: tl.constexpr, T: tl.constexpr,
            D: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """fp32 [T, M]: products of keys and queries, before the queries' scales."""
    KIND: tl.constexpr = KEYS[0]
    BITS: tl.constexpr = KEYS[1]
    PLACES: tl.constexpr = KEYS[2]
    S: tl.constexpr = KEYS[3]
    ASM: tl.constexpr = KEYS[4]
    SQUARES: tl.constexpr = KEYS[5]
    UNITS: tl.constexpr = D // PLACES
    x = _units(base, n, end, odd, by_token, by_unit, S, UNITS, BITS * PLACES, T, MASKED)
    beside = base + n * S + tl.arange(0, T) * S + D * BITS // 8
    k = operands(x, levels, KIND, BITS, PLACES, tl.float16, ASM)
    s = _dots(k, q, PLACES)
    if KIND == "codebook":
        norm = _loaded(_half(beside), inside, MASKED).to(tl.float32)
        ones = tl.full([UNITS, M], 1.0, tl.float16)
        square = tl.dot(_squares(k, SQUARES, PLACES), ones)
        s *= tl.rsqrt(square) * norm[:, None]
    elif KIND == "zero_point":
        step, zero = _zero_point(beside, inside, MASKED, 8.0)
        s = s * step[:, None] + zero[:, None] * sums[None, :]
    return s


@triton.constexpr_function
def _value_type(asm):
    """The interpreter multiplies no bf16."""
    return tl.bfloat16 if asm else tl.float32


@triton.jit
def _values(base, n, end, odd, by_token, by_unit, inside, T: tl.constexpr, D: tl.constexpr,
            MASKED: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """Places of centred codes, bf16 [U, T] each; step and zero of each token."""
    KIND: tl.constexpr = VALUES[0]
    BITS: tl.constexpr = VALUES[1]
    PLACES: tl.constexpr = VALUES[2]
    S: tl.constexpr = VALUES[3]
    ASM: tl.constexpr = VALUES[4]
    TYPE: tl.constexpr = _value_type(ASM)
    x = _units(base, n, end, odd, by_token, by_unit, S, D // PLACES, BITS * PLACES, T, MASKED)
    v = operands(tl.trans(x), base, KIND, BITS, PLACES, TYPE, ASM)
    beside = base + n * S + tl.arange(0, T) * S + D * BITS // 8
    centre: tl.constexpr = (1 << BITS) // 2
    if KIND == "zero_point":
        step, zero = _zero_point(beside, inside, MASKED, centre)
    else:
        both = _loaded(_word(beside), inside, MASKED)
        step = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) + centre * step
    return v, step, zero


@triton.jit
def _accumulated(acc, keep, v, p, PLACES: tl.constexpr):
    """Each place's sum, kept by as much, and the products of its codes with the probabilities."""
    a = (tl.dot(v[0], p, acc[0] * keep), tl.dot(v[1], p, acc[1] * keep))
    b = (tl.dot(v[2], p, acc[2] * keep), tl.dot(v[3], p, acc[3] * keep))
    found = (a[0], a[1], b[0], b[1])
    if PLACES == 8:
        c = (tl.dot(v[4], p, acc[4] * keep), tl.dot(v[5], p, acc[5] * keep))
        d = (tl.dot(v[6], p, acc[6] * keep), tl.dot(v[7], p, acc[7] * keep))
        found = (a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1])
    return found


@triton.jit
def _tile(acc, zeros, top, total, q, scales, sums, levels, keys, values, n, end, T: tl.constexpr,
          M: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr,
          VALUES: tl.constexpr):  # fmt: skip
    """One step of the online softmax, in powers of two."""
    inside = n + tl.arange(0, T) < end
    s = _scores(q, sums, levels, keys[0], n, end, keys[1], keys[2], keys[3], inside, M, T, D, MASKED, KEYS)
    v, step, zero = _values(values[0], n, end, values[1], values[2], values[3], inside, T, D, MASKED, VALUES)
    s *= scales[None, :]
    if MASKED:
        s = tl.where(inside[:, None], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, axis=0))
    p = tl.exp2(s - new[None, :])
    keep = tl.exp2(top - new)
    total = total * keep + tl.sum(p, axis=0)
    zeros = zeros * keep + tl.sum(p * zero[:, None], axis=0)
    weighted = (p * step[:, None]).to(v[0].dtype)
    PLACES: tl.constexpr = VALUES[2]
    return _accumulated(acc, keep[None, :], v, weighted, PLACES), zeros, new, total


@triton.jit
def _queries(address, PLACES: tl.constexpr, SIZE: tl.constexpr):
    """The tiles [U, M] of all places."""
    found = (
        tl.load(address),
        tl.load(address + SIZE),
        tl.load(address + 2 * SIZE),
        tl.load(address + 3 * SIZE),
    )
    if PLACES == 8:
        more = address + 4 * SIZE
        found = (
            found[0], found[1], found[2], found[3],
            tl.load(more), tl.load(more + SIZE), tl.load(more + 2 * SIZE), tl.load(more + 3 * SIZE),
        )  # fmt: skip
    return found


@triton.jit
def _side(base, any_word, length, U: tl.constexpr, T: tl.constexpr, SIDE: tl.constexpr):
    """Address, how far it is from a multiple of 4, and the shifts of units."""
    S: tl.constexpr = SIDE[3]
    UNIT_BITS: tl.constexpr = SIDE[1] * SIDE[2]
    odd = (base.to(tl.int64) & 3).to(tl.int32)
    by_token, by_unit = _shifts(any_word, length, odd, S, U, UNIT_BITS, T)
    return base, odd, by_token, by_unit


@triton.jit(
    do_not_specialize=["length", "run", "key_stride_b", "key_stride_h", "value_stride_b", "value_stride_h"]
)
def _attend(q_BHPUM, scale_BHM, sum_BHM, levels, keys, values, out_BHGRD, top_BHGR, total_BHGR, key_stride_b,
            key_stride_h, value_stride_b, value_stride_h, length, run, G: tl.constexpr, M: tl.constexpr,
            T: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """One run of tokens of one KV head: sums not divided yet, largest score, sum of probabilities."""
    KEY_PLACES: tl.constexpr = KEYS[2]
    PLACES: tl.constexpr = VALUES[2]
    KEY_UNITS: tl.constexpr = D // KEY_PLACES
    UNITS: tl.constexpr = D // PLACES
    r, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(1) + h
    m = tl.arange(0, M)
    u = tl.arange(0, KEY_UNITS)
    q = _queries(q_BHPUM + head * D * M + u[:, None] * M + m[None, :], KEY_PLACES, KEY_UNITS * M)
    scales, sums = tl.load(scale_BHM + head * M + m), tl.load(sum_BHM + head * M + m)
    any_word = _word(q_BHPUM)
    key_side = _side(keys + b * key_stride_b + h * key_stride_h, any_word, length, KEY_UNITS, T, KEYS)
    value_side = _side(values + b * value_stride_b + h * value_stride_h, any_word, length, UNITS, T, VALUES)
    none = tl.zeros([UNITS, M], tl.float32)
    acc = (none, none, none, none)
    if PLACES == 8:
        acc = (none, none, none, none, none, none, none, none)
    zeros, total = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    start = r * run
    end = tl.minimum(start + run, length)
    whole = start + (end - start) // T * T
    for n in tl.range(start, whole, T, num_stages=STAGES):
        acc, zeros, top, total = _tile(
            acc, zeros, top, total, q, scales, sums, levels, key_side, value_side, n, end, T, M, D, False,
            KEYS, VALUES,
        )  # fmt: skip
    if whole < end:
        acc, zeros, top, total = _tile(
            acc, zeros, top, total, q, scales, sums, levels, key_side, value_side, whole, end, T, M, D, True,
            KEYS, VALUES,
        )  # fmt: skip
    row = (head * G + m) * tl.num_programs(0) + r
    out = out_BHGRD + row[None, :] * D + tl.arange(0, UNITS)[:, None] * PLACES
    for place in tl.static_range(PLACES):
        tl.store(out + place, acc[place] + zeros[None, :], mask=(m < G)[None, :])
    tl.store(top_BHGR + row, top, mask=m < G)
    tl.store(total_BHGR + row, total, mask=m < G)


@triton.jit(do_not_specialize=["runs"])
def _together(part_NRD, top_NR, total_NR, signs_D, out_ND, runs, factor, D: tl.constexpr,
              STEPS: tl.constexpr, ALL: tl.constexpr, SOME: tl.constexpr, ROTATED: tl.constexpr,
              SIGNED: tl.constexpr):  # fmt: skip
    """Runs of one query head put together, and the values' rotation undone."""
    n = tl.program_id(0).to(tl.int64)
    r, d = tl.arange(0, ALL), tl.arange(0, D)
    tops = tl.load(top_NR + n * runs + r, mask=r < runs, other=float("-inf"))
    top = tl.max(tops, axis=0)
    sums = tl.load(total_NR + n * runs + r, mask=r < runs, other=0.0)
    total = tl.sum(tl.exp2(tops - top) * sums, axis=0)
    acc = tl.zeros([D], tl.float32)
    for first in range(0, runs, SOME):
        some = first + tl.arange(0, SOME)
        there = some < runs
        weight = tl.exp2(tl.load(top_NR + n * runs + some, mask=there, other=float("-inf")) - top)
        part = tl.load(part_NRD + (n * runs + some[:, None]) * D + d[None, :], mask=there[:, None], other=0.0)
        acc += tl.sum(part * weight[:, None], axis=0)
    acc /= total
    if ROTATED:
        acc = tl.reshape(hadamard(tl.reshape(acc, [1, D]), 1, D, STEPS), [D]) * factor
    if SIGNED:
        acc *= tl.load(signs_D + d)
    tl.store(out_ND + n * D + d, acc.to(out_ND.dtype.element_ty))


def problem(
    query_BHD: torch.Tensor, keys_BHTS: torch.Tensor, values_BHTS: torch.Tensor, keys: Packed, values: Packed
) -> str | None:
    """Why ``decode_attention`` cannot take these; None where it can."""
    head_dim, group = query_BHD.shape[-1], query_BHD.shape[1] // keys_BHTS.shape[1]
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim}, not one of {HEAD_DIMS}"
    if group * keys_BHTS.shape[1] != query_BHD.shape[1] or group > MOST_GROUP:
        return f"{query_BHD.shape[1]} query heads for {keys_BHTS.shape[1]} KV heads"
    if keys.kind == "affine" or values.kind in ("codebook", "e4m3"):
        return f"{keys.kind} keys and {values.kind} values"
    if keys_BHTS.shape[2] == 0 or keys_BHTS.shape[:3] != values_BHTS.shape[:3]:
        return f"keys {tuple(keys_BHTS.shape)} and values {tuple(values_BHTS.shape)}"
    for slots, side in ((keys_BHTS, keys), (values_BHTS, values)):
        size = side.slot_bytes(head_dim)
        if slots.shape[3] != size or slots.stride(3) != 1 or slots.stride(2) != size:
            return f"slots of {slots.shape[3]} bytes, {slots.stride(2)} apart, instead of {size}"
        grain = 2 if size % 4 else 4
        if any(number % grain for number in (slots.data_ptr(), slots.stride(0), slots.stride(1))):
            return f"slots that do not start at multiples of {grain}"
    return None


def decode_attention(
    query_BHD: torch.Tensor,
    keys_BHTS: torch.Tensor,
    values_BHTS: torch.Tensor,
    keys: Packed,
    values: Packed,
    scale: float,
) -> torch.Tensor:
    """[B, heads, D] in the query's dtype: softmax(scale * q k) v over all T packed tokens.

    Args:
        query_BHD: one query a sequence; its heads are those of KV head 0, then of KV head 1 and so on.
        keys_BHTS: uint8 slots [B, H, T, S]; the tokens of a head lie one after another.
        values_BHTS: the same of the values.
        scale: of the products, usually 1 / sqrt(D).
    """
    found = problem(query_BHD, keys_BHTS, values_BHTS, keys, values)
    assert found is None, found
    batch, heads, head_dim = query_BHD.shape
    kv_heads, length = keys_BHTS.shape[1:3]
    group = heads // kv_heads
    padded = max(8, triton.next_power_of_2(group))
    steps = head_dim.bit_length() - 1
    run = run_length(length, batch * kv_heads, query_BHD.device)
    runs = triton.cdiv(length, run)
    new = query_BHD.new_empty
    q = new(batch * kv_heads, head_dim, padded, dtype=torch.float16)
    scales, sums = new(2, batch * kv_heads, padded, dtype=torch.float32).unbind()
    _prepare[(batch * kv_heads,)](
        query_BHD.contiguous(), _signs(keys, query_BHD), q, scales, sums, scale * _LOG2_E,
        1.0 / (keys.factor * head_dim), group, padded, head_dim, steps, _places(keys, head_dim),
        keys.rotated, bool(keys.signs),
    )  # fmt: skip
    part = new(batch * heads, runs, head_dim, dtype=torch.float32)
    top, total = new(2, batch * heads, runs, dtype=torch.float32).unbind()
    _attend[(runs, kv_heads, batch)](
        q, scales, sums, _levels(keys, query_BHD), keys_BHTS, values_BHTS, part, top, total,
        *keys_BHTS.stride()[:2], *values_BHTS.stride()[:2], length, run, group, padded, TILE, head_dim,
        _constants(keys, head_dim, values=False), _constants(values, head_dim, values=True), STAGES,
        num_warps=1,
    )  # fmt: skip
    out = torch.empty_like(query_BHD, memory_format=torch.contiguous_format)
    _together[(batch * heads,)](
        part, top, total, _signs(values, query_BHD), out, runs,
        1.0 / (values.factor * head_dim), head_dim, steps, triton.next_power_of_2(runs), 16,
        values.rotated, bool(values.signs),
    )  # fmt: skip
    return out


def run_length(length: int, heads: int, device: torch.device) -> int:
    """Tokens of a run: so many that all programs run at once."""
    wanted = max(1, _processors(device) * PROGRAMS_OF_A_PROCESSOR // heads)
    return max(SHORTEST_RUN, triton.cdiv(triton.cdiv(length, wanted), TILE) * TILE)


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


@cache
def _processors(device: torch.device) -> int:
    if _interpreted():
        return 1
    found = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return int(found["multiprocessor_count"])


def _places(side: Packed, head_dim: int) -> int:
    """Codes of a unit: matrix instructions take 16 units or more."""
    return 4 if side.bits == 8 or head_dim < 128 else 8


@cache
def _constants(side: Packed, head_dim: int, *, values: bool) -> tuple[Any, ...]:
    """What a kernel knows of a side when it is compiled."""
    places, asm, squares = _places(side, head_dim), "", ""
    if not _interpreted():
        asm = unpack.assembly(side, places, values=values)
        squares = unpack.squares(places)
    return side.kind, side.bits, places, side.slot_bytes(head_dim), asm, squares


@cache
def _kept(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers or (0.0,), dtype=dtype, device=device)


def _signs(side: Packed, like: torch.Tensor) -> torch.Tensor:
    return _kept(side.signs, torch.float32, like.device)


def _levels(side: Packed, like: torch.Tensor) -> torch.Tensor:
    return unpack.unit_levels(side.levels, like.device)
