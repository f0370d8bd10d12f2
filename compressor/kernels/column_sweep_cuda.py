"""Triton twins of ``compressor.numerics.columns``: sweeps over columns, on CUDA.

Matrix products bring what wide and narrow blocks of columns before have done to a block; in it one kernel
goes through the columns, a tile of rows to a program, and spreads each column's change over those that
follow. Rows lie side by side in memory ([I, O]). Sums are taken in another order than torch's: values agree
but for near-ties.

A kernel of ``refit`` goes through the groups of a wide block, a tile of rows to a program. A matrix product
says where the errors of all columns, as they were before the block, pull a group; the kernel adds what the
groups before it changed. A trial is a lane of its own: candidates do not wait for one another.

Legend: B matrices of O rows and I columns, C groups in a row, W columns of a group, K candidate scales,
J columns of a wide block, R rows of a tile, S slots of a row: what it holds now and its candidates, padded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compressor.kernels.grid_codes_cuda import nearest
from compressor.numerics.grids import Grid

WIDE = 512
NARROW = 64
ROWS = 16
# Wider groups than these do not fit a program.
LARGEST_GROUP = 128
MOST_WARPS = 16
LANES = 32
# Columns of a trial that one lane holds without spilling registers.
LANE_COLUMNS = 32
UNROLL = tl.constexpr(8)


@triton.jit(
    do_not_specialize=["rows", "width", "block_stride", "error_stride", "scale_stride", "group_stride"]
)
def _sweep_block(
    wanted_BWO,
    target_BWO,
    changed_BWO,
    error_BWO,
    a_BWW,
    scale_BCO,
    zero_BCO,
    group_BW,
    rows,
    width,
    block_stride,
    error_stride,
    scale_stride,
    group_stride,
    low,
    high,
    KIND: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
):
    """Overwrites ``wanted`` with the values chosen, ``error`` with theirs; ``a``[j, i] is fed from j to i."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, W)
    inside, real = row < rows, column < width
    wanted_BWO += b * block_stride
    target_BWO += b * block_stride
    changed_BWO += b * block_stride
    error_BWO += b * error_stride
    a_BWW += b * width * width
    scale_BCO += b * scale_stride
    zero_BCO += b * scale_stride
    group_BW += b * group_stride
    v = tl.load(
        wanted_BWO + column[:, None] * rows + row[None, :], mask=real[:, None] & inside[None, :], other=0.0
    )
    for j in range(width):
        group = tl.load(group_BW + j).to(tl.int64) * rows
        scale = tl.load(scale_BCO + group + row, mask=inside, other=1.0)
        zero = tl.load(zero_BCO + group + row, mask=inside, other=0.0)
        target = tl.load(target_BWO + j * rows + row, mask=inside, other=0.0)
        before = tl.load(error_BWO + j * rows + row, mask=inside, other=0.0)
        a = tl.load(a_BWW + j * width + column, mask=real, other=0.0)
        own = tl.sum(tl.where(column[:, None] == j, v, 0.0), axis=0)
        value = nearest(own, scale, zero, low, high, KIND)
        error = value - target
        changed = error - before
        v -= a[:, None] * changed[None, :]
        tl.store(wanted_BWO + j * rows + row, value, mask=inside)
        tl.store(error_BWO + j * rows + row, error, mask=inside)
        tl.store(changed_BWO + j * rows + row, changed, mask=inside)


def sweep(
    target_BOI: torch.Tensor,
    chosen_BOI: torch.Tensor | None,
    a_BII: torch.Tensor,
    scale_BOC: torch.Tensor,
    zero_BOC: torch.Tensor,
    group_BI: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """See ``numerics.columns.sweep``. Extra memory: an fp32 copy of the matrices, and some of blocks."""
    batch, rows, columns = target_BOI.shape
    out_BOI = torch.empty_like(target_BOI, memory_format=torch.contiguous_format)
    error_BIO = _errors(target_BOI, chosen_BOI)
    scale_BCO, zero_BCO = scale_BOC.mT.contiguous(), zero_BOC.mT.contiguous()
    group_BI = group_BI.contiguous()
    for start in range(0, columns, WIDE):
        wide = slice(start, min(start + WIDE, columns))
        reach = columns if chosen_BOI is not None else start
        target_BJO = target_BOI[..., wide].mT.contiguous()
        wanted_BJO = target_BJO.clone()
        if reach:
            wanted_BJO.baddbmm_(a_BII[:, wide, :reach], error_BIO[:, :reach], alpha=-1)
        changed_BJO = torch.empty_like(target_BJO)
        for at in range(0, wide.stop - start, NARROW):
            own = slice(at, min(at + NARROW, wide.stop - start))
            here = slice(start + own.start, start + own.stop)
            if at:
                wanted_BJO[:, own].baddbmm_(a_BII[:, here, start : here.start], changed_BJO[:, :at], alpha=-1)
            _sweep_block[triton.cdiv(rows, ROWS), batch](
                wanted_BJO[:, own],
                target_BJO[:, own],
                changed_BJO[:, own],
                error_BIO[:, here],
                a_BII[:, here, here].mT.contiguous(),
                scale_BCO,
                zero_BCO,
                group_BI[:, here],
                rows,
                here.stop - here.start,
                target_BJO.stride(0),
                error_BIO.stride(0),
                scale_BCO.stride(0),
                group_BI.stride(0),
                grid.low,
                grid.high,
                grid.kind,
                NARROW,
                ROWS,
                num_warps=1,
            )
        out_BOI[..., wide] = wanted_BJO.mT
    return out_BOI


def _errors(target_BOI: torch.Tensor, chosen_BOI: torch.Tensor | None) -> torch.Tensor:
    """[B, I, O]: chosen - target, zero where nothing is chosen yet."""
    if chosen_BOI is None:
        batch, rows, columns = target_BOI.shape
        return torch.zeros(batch, columns, rows, device=target_BOI.device)
    return torch.sub(chosen_BOI.mT, target_BOI.mT).contiguous()


@triton.jit(
    do_not_specialize=[
        "rows",
        "groups",
        "width",
        "candidates",
        "block_stride",
        "feed_stride",
        "d_stride",
        "scale_stride_b",
        "scale_stride_o",
        "best_stride",
    ]
)
def _refit_block(
    centre_BJO,
    values_BJO,
    changed_BJO,
    feed_BJJ,
    a_BCWW,
    d_BCW,
    scale_BOCK,
    zero_BOCK,
    best_BCO,
    rows,
    groups,
    width,
    candidates,
    block_stride,
    feed_stride,
    d_stride,
    scale_stride_b,
    scale_stride_o,
    best_stride,
    low,
    high,
    KIND: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
):
    """Overwrites ``values``, fills ``best``; ``centre`` and ``changed`` are its scratch.

    Slot 0 is what a group holds, slot k + 1 candidate k. All that a lane reads of what others wrote lies
    behind a barrier. Trials come first in ``v``: so Triton gives lanes to them, and each has all its columns.
    """
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * R
    each, lane, column = first + tl.arange(0, R), tl.arange(0, R * S), tl.arange(0, W)
    row, slot = first + lane // S, lane % S
    within, inside, real, held = each < rows, row < rows, column < width, slot == 0
    centre_BJO += b * block_stride
    values_BJO += b * block_stride
    changed_BJO += b * block_stride
    feed_BJJ += b * feed_stride * feed_stride
    a_BCWW += b * d_stride * width
    d_BCW += b * d_stride
    best_BCO += b * best_stride
    k = tl.minimum(tl.maximum(slot - 1, 0), candidates - 1)
    candidate = b * scale_stride_b + row.to(tl.int64) * scale_stride_o + k
    for c in range(groups):
        at = c * width
        place = (at + column)[:, None] * rows + each[None, :]
        mask = real[:, None] & within[None, :]
        centre = tl.load(centre_BJO + place, mask=mask, other=0.0)
        for i in tl.range(0, at, loop_unroll_factor=UNROLL):
            feed = tl.load(feed_BJJ + i * feed_stride + at + column, mask=real, other=0.0)
            changed = tl.load(changed_BJO + i * rows + each, mask=within, other=0.0)
            centre -= feed[:, None] * changed[None, :]
        tl.store(centre_BJO + place, centre, mask=mask)
        tl.debug_barrier()
        scale = tl.load(scale_BOCK + candidate + c * candidates, mask=inside, other=1.0)
        zero = tl.load(zero_BOCK + candidate + c * candidates, mask=inside, other=0.0)
        place = row[:, None] + (at + column)[None, :] * rows
        v = tl.load(centre_BJO + place, mask=inside[:, None] & real[None, :], other=0.0)
        cost = tl.zeros([R * S], tl.float32)
        for j in range(width):
            best_real = tl.load(centre_BJO + (at + j) * rows + row, mask=inside, other=0.0)
            now = tl.load(values_BJO + (at + j) * rows + row, mask=inside & held, other=0.0)
            a = tl.load(a_BCWW + (at + j) * width + column, mask=real, other=0.0)
            d = tl.load(d_BCW + at + j)
            own = tl.sum(tl.where(column[None, :] == j, v, 0.0), axis=1)
            value = tl.where(held, now, nearest(own, scale, zero, low, high, KIND))
            miss = value - own
            cost += d * (miss * miss)
            v = tl.where(column[None, :] == j, value[:, None], v - (value - best_real)[:, None] * a[None, :])
        cost = tl.where(slot <= candidates, cost, float("inf"))
        best = tl.argmin(tl.reshape(cost, [R, S]), axis=1, tie_break_left=True)
        won = slot == tl.reshape(tl.broadcast_to(best[:, None], [R, S]), [R * S])
        mask = (inside & won)[:, None] & real[None, :]
        tl.store(changed_BJO + place, v - tl.load(values_BJO + place, mask=mask, other=0.0), mask=mask)
        tl.store(values_BJO + place, v, mask=mask)
        tl.store(best_BCO + c * rows + each, tl.maximum(best - 1, 0).to(tl.int64), mask=within)
        tl.debug_barrier()


def refit(
    target_BOI: torch.Tensor,
    chosen_BOI: torch.Tensor,
    h_BII: torch.Tensor,
    inverse_BCWW: torch.Tensor,
    a_BCWW: torch.Tensor,
    d_BCW: torch.Tensor,
    scale_BOCK: torch.Tensor,
    zero_BOCK: torch.Tensor,
    grid: Grid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``numerics.columns.refit``; W is at most ``LARGEST_GROUP``.

    Extra memory: as ``sweep``, and WIDE x I of each matrix.
    """
    batch, rows, _ = target_BOI.shape
    width = d_BCW.shape[2]
    out_BOI = torch.empty_like(chosen_BOI, memory_format=torch.contiguous_format)
    error_BIO = _errors(target_BOI, chosen_BOI)
    a_BCWW, d_BCW = a_BCWW.mT.contiguous(), d_BCW.contiguous()
    scale_BOCK, zero_BOCK = scale_BOCK.contiguous(), zero_BOCK.contiguous()
    best_BCO = torch.empty(batch, d_BCW.shape[1], rows, dtype=torch.int64, device=h_BII.device)
    step = max(WIDE // width, 1)
    for start in range(0, d_BCW.shape[1], step):
        some = slice(start, min(start + step, d_BCW.shape[1]))
        wide = slice(some.start * width, some.stop * width)
        target_BJO = target_BOI[..., wide].mT.contiguous()
        values_BJO = chosen_BOI[..., wide].mT.clone(memory_format=torch.contiguous_format)
        # what moves the best real values: a group's own errors do not
        feed_BCWI = inverse_BCWW[:, some] @ h_BII[:, wide].unflatten(1, (-1, width))
        feed_BCWI[..., wide].unflatten(3, (-1, width)).diagonal(dim1=1, dim2=3).zero_()
        feed_BJI = feed_BCWI.flatten(1, 2)
        _launch_refit(
            torch.baddbmm(target_BJO, feed_BJI, error_BIO, alpha=-1),
            values_BJO,
            feed_BJI[..., wide].mT.contiguous(),
            (a_BCWW[:, some], d_BCW[:, some], scale_BOCK[:, :, some], zero_BOCK[:, :, some]),
            best_BCO[:, some],
            grid,
        )
        torch.sub(values_BJO, target_BJO, out=error_BIO[:, wide])
        out_BOI[..., wide] = values_BJO.mT
    return out_BOI, best_BCO.mT.contiguous()


def _launch_refit(
    centre_BJO: torch.Tensor,
    values_BJO: torch.Tensor,
    feed_BJJ: torch.Tensor,
    groups: tuple[torch.Tensor, ...],
    best_BCO: torch.Tensor,
    grid: Grid,
) -> None:
    batch, _, rows = centre_BJO.shape
    a_BCWW, d_BCW, scale_BOCK, zero_BOCK = groups
    count, candidates = scale_BOCK.shape[2:]
    width = d_BCW.shape[2]
    padded, slots = triton.next_power_of_2(width), triton.next_power_of_2(candidates + 1)
    # trials fill whole warps, or where they are long, share one
    tile = ROWS if padded <= LANE_COLUMNS else max(LANES * LANE_COLUMNS // (padded * slots), 1)
    _refit_block[triton.cdiv(rows, tile), batch](
        centre_BJO,
        values_BJO,
        torch.empty_like(centre_BJO),
        feed_BJJ,
        a_BCWW,
        d_BCW,
        scale_BOCK,
        zero_BOCK,
        best_BCO,
        rows,
        count,
        width,
        candidates,
        centre_BJO.stride(0),
        feed_BJJ.stride(1),
        d_BCW.stride(0),
        scale_BOCK.stride(0),
        scale_BOCK.stride(1),
        best_BCO.stride(0),
        grid.low,
        grid.high,
        grid.kind,
        padded,
        tile,
        slots,
        num_warps=max(min(tile * slots // LANES, MOST_WARPS), 1),
        num_stages=1,
    )
