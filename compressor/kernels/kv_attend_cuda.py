"""Attention of one token over a run of packed keys and values, decoded in registers (Triton, CUDA).

One warp a program: a tile never leaves its registers, but for packed words on their way to the lanes that
need them. What hides the time that memory takes is many programs at once, with few registers each, and asking
for tiles ahead; copies to shared memory ahead (Triton's pipelining) would go in 4 bytes a lane, since slots
are aligned to no more, and take twice as long.

Legend: B sequences, H KV heads, G query heads of one KV head, M = G padded, T tokens of a tile, U units of a
token, P places in a unit, D head_dim, S bytes of a slot, R runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.kv_unpack_cuda import operands

_NONE = tl.constexpr(-(2**31 - 1))


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
def _exp2(x, ASM: tl.constexpr):
    """Subnormal results are zero: without code around the instruction that keeps them."""
    if ASM == "":
        found = tl.exp2(x)
    else:
        found = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return found


@triton.jit
def _rsqrt(x, ASM: tl.constexpr):
    """As ``_exp2``."""
    if ASM == "":
        found = tl.rsqrt(x)
    else:
        found = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
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


@triton.constexpr_function
def _across(slot_bytes, unit_bits):
    """Whether some units lie in two words."""
    return unit_bits in (12, 24) or (unit_bits == 32 and slot_bytes % 4 != 0)


@triton.jit
def _raw(base, n, end, odd, SIDE: tl.constexpr, T: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
         TURNED: tl.constexpr):  # fmt: skip
    """What is loaded of tokens n to n + T, n even: words with units [T, U], the words after them, scales [T].

    Words are turned to [U, T] for values.

    Slots start at even addresses: a pair of tokens at a multiple of 4 from the first, ``odd`` bytes after it.
    Constants apart from what a lane adds, so that loads have constant offsets.
    """
    S: tl.constexpr = SIDE[3]
    U: tl.constexpr = D // SIDE[2]
    UNIT_BITS: tl.constexpr = SIDE[1] * SIDE[2]
    i = tl.arange(0, T // 2)[:, None, None]
    t = tl.arange(0, 2)[None, :, None]
    bit = (t * S + odd) * 8 + tl.arange(0, U)[None, None, :] * UNIT_BITS
    lane = _word(base - odd) + (n >> 1) * (S // 2) + (bit >> 5)
    inside = n + 2 * i + t < end
    x = tl.reshape(_loaded(lane + i * (S // 2), inside, MASKED), [T, U])
    upper = 0
    if _across(S, UNIT_BITS):
        across = (bit & 31) + UNIT_BITS > 32
        upper = tl.reshape(_loaded(lane + i * (S // 2) + 1, inside & across, MASKED), [T, U])
        if TURNED:
            upper = tl.trans(upper)
    if TURNED:
        x = tl.trans(x)
    token = tl.arange(0, T)
    beside = base + n * S + token * S + D * SIDE[1] // 8
    scale = 0
    if SIDE[0] == "codebook":
        scale = _loaded(_half(beside), n + token < end, MASKED)
    elif SIDE[0] != "e4m3":
        scale = _loaded(_word(beside), n + token < end, MASKED)
    return x, upper, scale


@triton.jit
def _announce(base, n, end, SIDE: tl.constexpr, T: tl.constexpr):
    """Has the slots of tokens n to n + T brought into the L2 cache, without waiting."""
    if SIDE[4] != "":
        address = base + tl.minimum(n, end - 1) * SIDE[3] + tl.arange(0, 32) * (SIDE[3] * T // 32)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address.to(tl.int64)], tl.int32, False, 1
        )


@triton.jit
def _units(x, upper, by_token, by_unit, SIDE: tl.constexpr, TURNED: tl.constexpr):
    """int32 [T, U], or [U, T]: units, in the low bits."""
    UNIT_BITS: tl.constexpr = SIDE[1] * SIDE[2]
    if SIDE[3] % 4 != 0 or UNIT_BITS != 32:
        if TURNED:
            shift = by_token[None, :] + by_unit[:, None]
        else:
            shift = by_token[:, None] + by_unit[None, :]
        if _across(SIDE[3], UNIT_BITS):
            wide = (upper.to(tl.uint32).to(tl.uint64) << 32) | x.to(tl.uint32).to(tl.uint64)
        else:
            wide = (x.to(tl.uint32).to(tl.uint64) << 32) | x.to(tl.uint32).to(tl.uint64)
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
def _zero_point(bits, CENTRE: tl.constexpr):
    """Step, and what a centred code of zero stands for."""
    step = (bits & -16).to(tl.float32, bitcast=True)
    return step, step * (CENTRE - (bits & 15).to(tl.float32))


@triton.jit
def _scores(q, sums, levels, raw, by_token, by_unit, M: tl.constexpr, KEYS: tl.constexpr):
    """fp32 [T, M]: products of keys and queries, before the queries' scales."""
    KIND: tl.constexpr = KEYS[0]
    PLACES: tl.constexpr = KEYS[2]
    ASM: tl.constexpr = KEYS[4]
    SQUARES: tl.constexpr = KEYS[5]
    x = _units(raw[0], raw[1], by_token, by_unit, KEYS, False)
    k = operands(x, levels, KIND, KEYS[1], PLACES, tl.float16, ASM)
    s = _dots(k, q, PLACES)
    if KIND == "codebook":
        ones = tl.full([x.shape[1], M], 1.0, tl.float16)
        square = tl.dot(_squares(k, SQUARES, PLACES), ones)
        s *= _rsqrt(square, ASM) * raw[2].to(tl.float32)[:, None]
    elif KIND == "zero_point":
        step, zero = _zero_point(raw[2], 8.0)
        s = s * step[:, None] + zero[:, None] * sums[None, :]
    return s


@triton.constexpr_function
def _value_type(asm):
    """The interpreter multiplies no bf16."""
    return tl.bfloat16 if asm else tl.float32


@triton.jit
def _values(levels, raw, by_token, by_unit, VALUES: tl.constexpr):
    """Places of centred codes, bf16 [U, T] each; step and zero of each token."""
    KIND: tl.constexpr = VALUES[0]
    BITS: tl.constexpr = VALUES[1]
    ASM: tl.constexpr = VALUES[4]
    TYPE: tl.constexpr = _value_type(ASM)
    x = _units(raw[0], raw[1], by_token, by_unit, VALUES, True)
    v = operands(x, levels, KIND, BITS, VALUES[2], TYPE, ASM)
    centre: tl.constexpr = (1 << BITS) // 2
    if KIND == "zero_point":
        step, zero = _zero_point(raw[2], centre)
    else:
        step = raw[2].to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = (raw[2] >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) + centre * step
    return v, step, zero


@triton.jit
def _accumulated(acc, keep, v, p, PLACES: tl.constexpr):
    """Each place's sum, kept by as much, and the products of its codes with the probabilities."""
    a = (tl.dot(v[0], p, acc[0] * keep), tl.dot(v[1], p, acc[1] * keep))
    b = (tl.dot(v[2], p, acc[2] * keep), tl.dot(v[3], p, acc[3] * keep))
    if PLACES == 4:
        return a[0], a[1], b[0], b[1]
    else:  # noqa: RET505 (Triton compiles what follows a return)
        c = (tl.dot(v[4], p, acc[4] * keep), tl.dot(v[5], p, acc[5] * keep))
        d = (tl.dot(v[6], p, acc[6] * keep), tl.dot(v[7], p, acc[7] * keep))
        return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


@triton.jit
def _tile(state, q, scales, sums, levels, key_raw, value_raw, keys, values, n, end, T: tl.constexpr,
          M: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """One step of the online softmax, in powers of two."""
    acc, zeros, top, total = state
    ASM: tl.constexpr = VALUES[4]
    s = _scores(q, sums, levels, key_raw, keys[2], keys[3], M, KEYS) * scales[None, :]
    v, step, zero = _values(levels, value_raw, values[2], values[3], VALUES)
    if MASKED:
        s = tl.where((n + tl.arange(0, T) < end)[:, None], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, axis=0))
    p = _exp2(s - new[None, :], ASM)
    keep = _exp2(top - new, ASM)
    total = total * keep + tl.sum(p, axis=0)
    zeros = zeros * keep + tl.sum(p * zero[:, None], axis=0)
    weighted = (p * step[:, None]).to(v[0].dtype)
    return _accumulated(acc, keep[None, :], v, weighted, VALUES[2]), zeros, new, total


@triton.jit
def _queries(address, PLACES: tl.constexpr, SIZE: tl.constexpr):
    """The tiles [U, M] of all places."""
    a, b = tl.load(address), tl.load(address + SIZE)
    c, d = tl.load(address + 2 * SIZE), tl.load(address + 3 * SIZE)
    if PLACES == 4:
        return a, b, c, d
    else:  # noqa: RET505 (Triton compiles what follows a return)
        more = address + 4 * SIZE
        e, f = tl.load(more), tl.load(more + SIZE)
        g, h = tl.load(more + 2 * SIZE), tl.load(more + 3 * SIZE)
        return a, b, c, d, e, f, g, h


@triton.jit
def _nothing(U: tl.constexpr, M: tl.constexpr, PLACES: tl.constexpr):
    """Sums of all places before the first token."""
    none = tl.zeros([U, M], tl.float32)
    if PLACES == 4:
        return none, none, none, none
    else:  # noqa: RET505 (Triton compiles what follows a return)
        return none, none, none, none, none, none, none, none


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
def attend(q_BHPUM, scale_BHM, sum_BHM, levels, keys, values, out_BHGRD, top_BHGR, total_BHGR, key_stride_b,
            key_stride_h, value_stride_b, value_stride_h, length, run, G: tl.constexpr, M: tl.constexpr,
            T: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
            VALUES: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
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
    zeros, total = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    state = (_nothing(UNITS, M, PLACES), zeros, top, total)
    start = r * run
    end = tl.minimum(start + run, length)
    whole = start + (end - start) // T * T
    for n in tl.range(start, whole, T, num_stages=1):
        key_raw = _raw(key_side[0], n, end, key_side[1], KEYS, T, D, False, False)
        value_raw = _raw(value_side[0], n, end, value_side[1], VALUES, T, D, False, True)
        if AHEAD > 0:
            _announce(key_side[0], n + AHEAD * T, end, KEYS, T)
            _announce(value_side[0], n + AHEAD * T, end, VALUES, T)
        state = _tile(state, q, scales, sums, levels, key_raw, value_raw, key_side, value_side, n, end,
                      T, M, False, KEYS, VALUES)  # fmt: skip
    if whole < end:
        key_raw = _raw(key_side[0], whole, end, key_side[1], KEYS, T, D, True, False)
        value_raw = _raw(value_side[0], whole, end, value_side[1], VALUES, T, D, True, True)
        state = _tile(state, q, scales, sums, levels, key_raw, value_raw, key_side, value_side, whole, end,
                      T, M, True, KEYS, VALUES)  # fmt: skip
    acc, zeros, top, total = state
    row = (head * G + m) * tl.num_programs(0) + r
    out = out_BHGRD + row[None, :] * D + tl.arange(0, UNITS)[:, None] * PLACES
    for place in tl.static_range(PLACES):
        tl.store(out + place, acc[place] + zeros[None, :], mask=(m < G)[None, :])
    tl.store(top_BHGR + row, top, mask=m < G)
    tl.store(total_BHGR + row, total, mask=m < G)
