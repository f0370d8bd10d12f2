"""What can be said of a tensor that a transform changed before it was quantized: by bounds, not bit for bit.

Smoothing (SmoothQuant, arXiv:2211.10438; AWQ, arXiv:2306.00978) multiplies input channels by positive factors
and divides what makes them, the norm before or the rows of the matrix before. A matrix is then its source's
but for one factor a row and one a column. Rotations (SpinQuant, arXiv:2405.16406) leave no entry as it was.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Factors of single channels: SmoothQuant's on models with massive activations reach some hundreds.
FACTOR = 1e3
# As many channels may have others.
STRAY = 0.01
# As many may be lost: small ones round to zero beside large ones of their group.
LOST = 0.05
# How much larger or smaller a whole tensor may have become.
SIZE = 64.0
_ROUNDS = 6


def unscaled(ours_OI: torch.Tensor, source_OI: torch.Tensor) -> torch.Tensor | None:
    """The source with the factors of rows and columns that bring it nearest to ours, all fp32.

    None where these are none that a smoothing makes: more than a few zero, negative, or far from the others.
    """
    import torch

    def fit(axis: int, other: torch.Tensor) -> torch.Tensor:
        scaled_OI = source_OI * other
        energy = scaled_OI.square().sum(axis, keepdim=True)
        factors = (ours_OI * scaled_OI).sum(axis, keepdim=True) / energy
        return torch.where(energy > 0, factors, torch.ones_like(factors))

    row_O1 = source_OI.new_ones(len(source_OI), 1)
    for _ in range(_ROUNDS):
        column_1I = fit(0, row_O1)
        row_O1 = fit(1, column_1I)
    if not _plausible(column_1I) or not _plausible(row_O1):
        return None
    return source_OI * column_1I * row_O1


def _plausible(factors: torch.Tensor) -> bool:
    """Whether nearly all are positive and within ``FACTOR`` of their median, but for some that are zero."""
    middle = float(factors.median())
    lost = factors == 0
    # NaN compares false with everything.
    near = (factors >= middle / FACTOR) & (factors <= middle * FACTOR)
    count, strays = factors.numel(), int((~near & ~lost).sum())
    return middle > 0 and strays <= STRAY * count and int(lost.sum()) <= LOST * count


def sane_size(ours: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether ours is finite and, as a whole, of about the source's size."""
    mine, theirs = (float(values.double().square().sum()) for values in (ours, source))
    return theirs / SIZE**2 <= mine <= theirs * SIZE**2


def sane_factors(ours: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether every entry is the source's times a positive factor that a smoothing can have."""
    import torch

    mine, theirs = ours.double(), source.double()
    zero = theirs == 0
    ratio = mine / theirs.where(~zero, mine.new_ones(()))
    return bool(torch.where(zero, mine == 0, (ratio >= 1 / FACTOR) & (ratio <= FACTOR)).all())
