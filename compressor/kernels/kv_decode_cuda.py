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

from compressor.kernels import kv_unpack_cuda as unpack
from compressor.kernels.kv_attend_cuda import attend
from compressor.kernels.kv_ends_cuda import put_together, rotate_queries
from compressor.kernels.kv_packed import Packed

TILE = 32  # tokens: a smaller tile leaves registers for more programs, and was slower on an H100
REGISTERS = 255  # of a thread: all that there are
REGISTERS_OF_A_PROCESSOR = 1 << 16
AHEAD = 2  # tiles from the one that is read to the one that memory is asked for
SHORTEST_RUN = 64  # tokens
HEAD_DIMS = (64, 128, 256)
MOST_GROUP = 32  # query heads of a KV head

_LOG2_E = 1.4426950408889634


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
    rotate_queries[(batch * kv_heads,)](
        query_BHD.contiguous(), _signs(keys, query_BHD), q, scales, sums, scale * _LOG2_E,
        1.0 / (keys.factor * head_dim), group, padded, head_dim, steps, _places(keys, head_dim),
        keys.rotated, bool(keys.signs), num_warps=1,
    )  # fmt: skip
    part = new(batch * heads, runs, head_dim, dtype=torch.float32)
    top, total = new(2, batch * heads, runs, dtype=torch.float32).unbind()
    attend[(runs, kv_heads, batch)](
        q, scales, sums, _levels(keys, query_BHD), keys_BHTS, values_BHTS, part, top, total,
        *keys_BHTS.stride()[:2], *values_BHTS.stride()[:2], length, run, group, padded, TILE, head_dim,
        _constants(keys, head_dim, values=False), _constants(values, head_dim, values=True), AHEAD,
        num_warps=1, maxnreg=REGISTERS,
    )  # fmt: skip
    out = torch.empty_like(query_BHD, memory_format=torch.contiguous_format)
    put_together[(batch * heads,)](
        part, top, total, _signs(values, query_BHD), out, runs,
        1.0 / (values.factor * head_dim), head_dim, steps, triton.next_power_of_2(runs), 64,
        values.rotated, bool(values.signs), num_warps=8,
    )  # fmt: skip
    return out


def run_length(length: int, heads: int, device: torch.device) -> int:
    """Tokens of a run: so many that all programs, of one warp each, run at once."""
    programs = _processors(device) * (REGISTERS_OF_A_PROCESSOR // (32 * (REGISTERS + 7 & -8)))
    wanted = max(1, programs // heads)
    return max(SHORTEST_RUN, -(-length // (wanted * TILE)) * TILE)


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
