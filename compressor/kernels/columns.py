"""``compressor.numerics.columns``, compiled where there is a compiler for the device.

On the CPU nothing here depends on the number of threads, bit for bit. Results of the twins agree up to the
rounding of fp32 sums; a value that is almost half-way between two of the lattice may go either way.

Legend: B matrices of O rows and I columns, C groups in a row, W columns of a group, K candidate scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.kernels import as_array, compiled, in_threads, on_cuda
from compressor.numerics import columns
from compressor.numerics.grids import Grid


def sweep(
    target_BOI: torch.Tensor,
    chosen_BOI: torch.Tensor | None,
    a_BII: torch.Tensor,
    scale_BOC: torch.Tensor,
    zero_BOC: torch.Tensor,
    group_BI: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """See ``numerics.columns.sweep``."""
    if on_cuda(target_BOI):
        from compressor.kernels import column_sweep_cuda as cuda

        return cuda.sweep(target_BOI, chosen_BOI, a_BII, scale_BOC, zero_BOC, group_BI, grid)
    if not compiled(target_BOI):
        return columns.sweep(target_BOI, chosen_BOI, a_BII, scale_BOC, zero_BOC, group_BI, grid)
    from compressor.kernels import column_sweep_cpu as cpu

    first = chosen_BOI is None
    out_BOI = torch.empty(target_BOI.shape)
    if chosen_BOI is not None:
        out_BOI.copy_(chosen_BOI)
    _in_tiles(
        cpu.sweep_kernel(grid.kind),
        (target_BOI, out_BOI, scale_BOC, zero_BOC),
        (a_BII, group_BI.to(torch.int32)),
        (np.float32(grid.low), np.float32(grid.high), first),
    )
    return out_BOI


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
    """See ``numerics.columns.refit``."""
    blocks = (inverse_BCWW, a_BCWW, d_BCW)
    if on_cuda(target_BOI):
        from compressor.kernels import column_sweep_cuda as cuda

        if d_BCW.shape[2] <= cuda.LARGEST_GROUP:
            return cuda.refit(target_BOI, chosen_BOI, h_BII, *blocks, scale_BOCK, zero_BOCK, grid)
    if not compiled(target_BOI):
        return columns.refit(target_BOI, chosen_BOI, h_BII, *blocks, scale_BOCK, zero_BOCK, grid)
    from compressor.kernels import column_sweep_cpu as cpu

    out_BOI = chosen_BOI.clone(memory_format=torch.contiguous_format)
    best_BOC = torch.empty(scale_BOCK.shape[:-1], dtype=torch.int32)
    _in_tiles(
        cpu.refit_kernel(grid.kind),
        (target_BOI, out_BOI, scale_BOCK, zero_BOCK, best_BOC),
        (h_BII, *blocks),
        (np.float32(grid.low), np.float32(grid.high)),
    )
    return out_BOI, best_BOC.long()


def _in_tiles(
    kernel: Callable[..., None],
    by_row: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor],
    more: tuple[object, ...] = (),
) -> None:
    """Calls ``kernel(rows of by_row..., shared..., more...)`` for each matrix, its rows in threads."""
    for arrays in zip(*map(as_array, (*by_row, *shared)), strict=True):
        _matrix_in_tiles(kernel, arrays[: len(by_row)], (*arrays[len(by_row) :], *more))


def _matrix_in_tiles(
    kernel: Callable[..., None], by_row: tuple[npt.NDArray[Any], ...], others: tuple[object, ...]
) -> None:
    from compressor.kernels.column_sweep_cpu import TILE

    first = by_row[0]
    in_threads(
        lambda part: kernel(*(rows[part] for rows in by_row), *others), len(first), first.size, multiple=TILE
    )
