"""Groups and chunks of a matrix."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics import groups
from compressor.numerics.groups import from_groups, importance_groups, row_chunks, to_groups


@pytest.mark.parametrize(
    ("shape", "group"),
    [((6, 32), (1, 16)), ((5, 12), (1, 12)), ((256, 256), (128, 128)), ((200, 256), (128, 128))],
)
def test_groups_hold_their_blocks_and_round_trip(shape: tuple[int, int], group: tuple[int, int]) -> None:
    """Each group is its block of the zero-padded matrix, row by row; the inverse drops the padding."""
    weight = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    rows, columns = group
    grouped = to_groups(weight, rows, columns)
    padded = torch.zeros(-(-shape[0] // rows) * rows, shape[1])
    padded[: shape[0]] = weight
    blocks = [
        padded[i : i + rows, j : j + columns].flatten()
        for i in range(0, padded.shape[0], rows)
        for j in range(0, shape[1], columns)
    ]
    assert torch.equal(grouped, torch.stack(blocks))
    assert torch.equal(from_groups(grouped, rows, columns, shape), weight)


def test_importance_follows_the_columns() -> None:
    """Every row of a block has the importance of the block's columns."""
    importance = torch.arange(1.0, 9.0)
    grouped = importance_groups(importance, 2, 4)
    assert grouped.tolist() == [[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 5, 6, 7, 8]]


def test_chunks_cover_all_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consecutive ranges, whole multiples but for the last, never empty, also where a row exceeds a chunk."""
    monkeypatch.setattr(groups, "CHUNK_VALUES", 64)
    for rows, columns, multiple in [(10, 16, 1), (10, 16, 4), (300, 128, 128), (3, 1000, 1), (1, 1, 1)]:
        chunks = list(row_chunks(rows, columns, multiple))
        assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
        assert all((chunk.stop - chunk.start) % multiple == 0 for chunk in chunks[:-1])
