"""The values that a matrix can take once its scales are chosen, row by row and group by group.

Legend: O rows and I columns of the matrix, C groups in a row, W = I / C columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compressor.numerics.grids import Grid


@dataclass(frozen=True)
class Lattice:
    """The value of code q in row o and group c is (q - zero[o, c]) * scale[o, c], for q in the grid.

    Attributes:
        grid: the format's.
        scale_OC: fp32, positive, as the decoder will read them.
        zero_OC: fp32 integers; zeros for symmetric formats.
    """

    grid: Grid
    scale_OC: torch.Tensor
    zero_OC: torch.Tensor

    def scaled(self, factor: float) -> Lattice:
        """The lattice of the matrix times ``factor``."""
        return Lattice(self.grid, self.scale_OC * factor, self.zero_OC)


def concatenate(lattices: list[Lattice]) -> Lattice:
    """The lattice of matrices of one format and width, one below the other."""
    scale_OC = torch.cat([lattice.scale_OC for lattice in lattices])
    return Lattice(lattices[0].grid, scale_OC, torch.cat([lattice.zero_OC for lattice in lattices]))
