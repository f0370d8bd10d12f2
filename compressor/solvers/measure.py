"""Checks and sums that every solver shares. Imported only where arithmetic is done.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

import torch

from compressor.errors import CheckpointError

# Values summed at once: torch takes one thread for fewer than 2**15.
SUMMED_VALUES = 1 << 14
ACCELERATOR_VALUES = 1 << 22


def check_finite(weight_OI: torch.Tensor) -> None:
    """Raises CheckpointError, with the count, where a weight is NaN or infinite."""
    low, high = (float(bound) for bound in weight_OI.aminmax())
    if low - low == 0.0 and high - high == 0.0:
        return
    count = int((~weight_OI.isfinite()).sum())
    raise CheckpointError(
        f"the tensor has {count:,} non-finite values (NaN or infinite)",
        fix="the source is damaged or was saved wrongly: fetch it again, or leave the tensor in 16 bit",
    )


def squares(weight_OI: torch.Tensor, decoded_OI: torch.Tensor) -> tuple[float, float]:
    """Sums of (decoded - weight)^2 and of weight^2 in fp64, the same in any number of threads."""
    errors, norms = [], []
    for rows in _parts(weight_OI):
        weight = weight_OI[rows].double()
        norms.append(_sum(weight.square()))
        errors.append(_sum((decoded_OI[rows].double() - weight).square_()))
    return _total(errors), _total(norms)


def inner(first_OI: torch.Tensor, second_OI: torch.Tensor) -> float:
    """Sum of the products of two matrices' values in fp64, the same in any number of threads."""
    return _total([_sum(first_OI[rows].double() * second_OI[rows].double()) for rows in _parts(first_OI)])


def _sum(terms_OI: torch.Tensor) -> torch.Tensor:
    if terms_OI.is_cuda:
        return terms_OI.sum()
    return torch.stack([part.sum() for part in torch.split(terms_OI.flatten(), SUMMED_VALUES)]).cumsum(0)[-1]


def _total(sums: list[torch.Tensor]) -> float:
    """In order; one wait for an accelerator."""
    return float(sum(torch.stack(sums).tolist()))


def _parts(matrix_OI: torch.Tensor) -> list[slice]:
    """Rows that are worked on at once: a cacheful, on an accelerator what bounds the memory."""
    values = ACCELERATOR_VALUES if matrix_OI.is_cuda else SUMMED_VALUES
    step = max(values // matrix_OI.shape[1], 1)
    return [slice(start, start + step) for start in range(0, matrix_OI.shape[0], step)]
