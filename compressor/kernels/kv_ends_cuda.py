"""What comes before and after the kernel that reads a packed KV cache: queries rotated, runs put together.

Legend: B sequences, H KV heads, G query heads of one KV head, M = G padded, U units of a token, P places in a
unit, D head_dim, R runs, N query heads of all sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compressor.kernels.hadamard_cuda import hadamard

_LEAST_QUERY = tl.constexpr(1e-30)


@triton.jit
def rotate_queries(q_BHGD, signs_D, q_BHPUM, scale_BHM, sum_BHM, scale, factor, G: tl.constexpr,
                   M: tl.constexpr, D: tl.constexpr, STEPS: tl.constexpr, PLACES: tl.constexpr,
                   ROTATED: tl.constexpr, SIGNED: tl.constexpr):  # fmt: skip
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


@triton.jit(do_not_specialize=["runs"])
def put_together(part_NRD, top_NR, total_NR, signs_D, out_ND, runs, factor, D: tl.constexpr,
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
