"""Codes of matrices whose groups have a scale each, and back. Imported only where arithmetic is done.

Legend: O out_features, I in_features, B x C the groups as a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from compressor.kernels import decode, encode
from compressor.numerics.groups import from_groups, row_chunks, to_groups
from compressor.schemes.base import Scales

if TYPE_CHECKING:
    from compressor.numerics.grids import Grid


def group_chunks(weight_OI: torch.Tensor, group: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Ranges of rows, and of rows of groups, that bound the memory of temporaries."""
    rows = group[0]
    for chunk in row_chunks(weight_OI.shape[0], weight_OI.shape[1], rows):
        yield chunk, slice(chunk.start // rows, -(-chunk.stop // rows))


def encode_chunks(
    weight_OI: torch.Tensor, scales: Scales, group: tuple[int, int], grid: Grid
) -> Iterator[torch.Tensor]:
    """Codes of the grid for successive chunks of rows.

    Arithmetic is fp32, as the library's for fp32 weights and scales: a bf16 quotient would round twice.
    """
    for chunk, part in group_chunks(weight_OI, group):
        w_NG = to_groups(weight_OI[chunk].float(), *group)
        scale_N = scales.scale[part].flatten().float()
        # minus zero: adding it keeps the sign of negative zeros
        zero_N = -torch.zeros_like(scale_N)
        if scales.zero_point is not None:
            zero_N = scales.zero_point[part].flatten().float()
        shape = (chunk.stop - chunk.start, weight_OI.shape[1])
        yield from_groups(encode(w_NG, scale_N, zero_N, grid), *group, shape)


def decode_rows(
    codes_OI: torch.Tensor,
    scale_BC: torch.Tensor,
    zero_BC: torch.Tensor | None,
    group: tuple[int, int],
    grid: Grid,
) -> torch.Tensor:
    """fp32 [O, I]: (value - zero point) * scale; scales and zero points are fp32."""
    scale_N = scale_BC.flatten()
    zero_N = torch.zeros_like(scale_N) if zero_BC is None else zero_BC.flatten()
    weight_NG = decode(to_groups(codes_OI, *group), scale_N, zero_N, grid)
    return from_groups(weight_NG, *group, (codes_OI.shape[0], codes_OI.shape[1]))
