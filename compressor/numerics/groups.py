"""Matrices cut into groups that share a scale, and walked in chunks of rows.

Legend: O rows and I columns of the matrix; a group is R rows by C columns; N groups of G = R * C values,
in row-major order of the groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# About 2 million values at a time: 8 MB in fp32, below 100 MB with all temporaries.
CHUNK_VALUES = 1 << 21


def row_chunks(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Consecutive row ranges of about ``CHUNK_VALUES`` values, each (but the last) a multiple of rows."""
    step = max(CHUNK_VALUES // max(columns, 1) // multiple, 1) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def to_groups(weight_OI: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[N, G] of a matrix; rows that are missing from the last groups are zero. I must be a multiple of C."""
    out_features, in_features = weight_OI.shape
    assert in_features % columns == 0, "the columns do not divide into groups"
    if rows == 1:
        return weight_OI.reshape(-1, columns)
    padding = -out_features % rows
    if padding:
        weight_OI = torch.nn.functional.pad(weight_OI, (0, 0, 0, padding))
    blocks = weight_OI.reshape(-1, rows, in_features // columns, columns)
    return blocks.transpose(1, 2).reshape(-1, rows * columns)


def from_groups(groups_NG: torch.Tensor, rows: int, columns: int, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of ``to_groups``: [O, I]."""
    out_features, in_features = shape
    if rows == 1:
        return groups_NG.reshape(shape)
    blocks = groups_NG.reshape(-1, in_features // columns, rows, columns)
    return blocks.transpose(1, 2).reshape(-1, in_features)[:out_features]


def importance_groups(importance_I: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """fp32 [I / C, G]: the importance of each value of one row of groups; group n has row n % (I / C)."""
    return importance_I.reshape(-1, 1, columns).expand(-1, rows, -1).reshape(-1, rows * columns).contiguous()
