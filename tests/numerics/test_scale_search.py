"""The search among given candidates, against plain loops."""

from __future__ import annotations

import pytest
import torch

from compressor.numerics.grids import E2M1, E4M3, INT4, INT8, Grid
from compressor.numerics.scale_search import best_candidate, tree_sum


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 31, 100])
def test_tree_sum_adds_every_term_in_the_stated_order(length: int) -> None:
    """The last half is added to the first until one is left; compared with a recursion on Python floats."""
    terms = torch.rand(3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))

    def tree(row: list[float]) -> float:
        if len(row) == 1:
            return row[0]
        tail = row[len(row) - len(row) // 2 :]
        head = row[: len(row) - len(row) // 2]
        return tree([a + b for a, b in zip(head, tail, strict=False)] + head[len(tail) :])

    expected = [tree(row) for row in terms.tolist()]
    assert tree_sum(terms.clone()).tolist() == expected


@pytest.mark.parametrize("grid", [E2M1, E4M3, INT4, INT8], ids=["e2m1", "e4m3", "int4", "int8"])
def test_best_is_the_least_error_in_fp64(grid: Grid) -> None:
    """The chosen candidate's error, computed in fp64 from decoded values, is the least to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 32, generator=generator)
    importance = torch.rand(2, 32, generator=generator) + 0.01
    scale = torch.rand(40, 9, generator=generator) * 3 / grid.high + 0.2 / grid.high
    zero = torch.randint(-3, 4, (40, 9), generator=generator).float() * (grid.kind == "int")
    chosen = best_candidate(w, importance, scale, zero, grid)
    errors = torch.stack(
        [
            (
                (grid.decode(grid.encode(w, scale[:, k], zero[:, k]), scale[:, k], zero[:, k]) - w).double()
                ** 2
                * importance.repeat(20, 1)
            ).sum(1)
            for k in range(9)
        ],
        dim=1,
    )
    taken = errors.gather(1, chosen[:, None])[:, 0]
    assert (taken <= errors.amin(1) * (1 + 1e-5)).all()


def test_first_of_equals_wins() -> None:
    """Equal candidates: the first is taken."""
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    scale = torch.full((4, 5), 0.3)
    assert best_candidate(w, torch.ones(1, 16), scale, torch.zeros_like(scale), INT4).tolist() == [0] * 4
