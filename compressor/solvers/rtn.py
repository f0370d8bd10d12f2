"""Round to nearest: each value goes to the nearest one that its scale allows; only the scales are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from compressor.errors import CheckpointError
from compressor.schemes.base import Search
from compressor.solvers.base import Solved, Solver

if TYPE_CHECKING:
    import torch

    from compressor.schemes.base import Scheme


_SEARCHED_BYTES_PER_S = 25e6
_MINMAX_BYTES_PER_S = 100e6


class Rtn(Solver):
    """Round to nearest, with scales found by ``search``: the best for the error, or of the range (faster).

    Extra memory: the decoded matrix in fp32 and temporaries of one chunk of rows, below 200 MB each.
    """

    kind: Literal["rtn"] = "rtn"
    search: Search = "full"

    @property
    def bytes_per_s(self) -> float:
        """See ``Solver.bytes_per_s``; rates of ``scripts/bench.py stream``, rounded down."""
        return _SEARCHED_BYTES_PER_S if self.search == "full" else _MINMAX_BYTES_PER_S

    def solve(self, weights_OI: Sequence[torch.Tensor], scheme: Scheme) -> list[Solved]:
        """See ``Solver.solve``."""
        import torch

        # An fp64 weight may be larger than fp32 holds: that shows as not finite.
        narrow = [w.float() if w.dtype == torch.float64 else w for w in weights_OI]
        for weight_OI in narrow:
            _check_finite(weight_OI)
        fitted = scheme.fit(narrow, search=self.search)
        solved = []
        for weight_OI, scales in zip(narrow, fitted, strict=True):
            tensors = scheme.encode(weight_OI, scales)
            decoded_OI = scheme.decode(tensors, *weight_OI.shape)
            solved.append(Solved(tensors, *_squares(weight_OI, decoded_OI)))
        return solved


def _check_finite(weight_OI: torch.Tensor) -> None:
    low, high = (float(bound) for bound in weight_OI.aminmax())
    if low - low == 0.0 and high - high == 0.0:
        return
    count = int((~weight_OI.isfinite()).sum())
    raise CheckpointError(
        f"the tensor has {count:,} non-finite values (NaN or infinite)",
        fix="the source is damaged or was saved wrongly: fetch it again, or leave the tensor in 16 bit",
    )


def _squares(weight_OI: torch.Tensor, decoded_OI: torch.Tensor) -> tuple[float, float]:
    """Sums of (decoded - weight)^2 and of weight^2 in fp64; overwrites ``decoded_OI``."""
    import torch

    error = norm = 0.0
    decoded_OI -= weight_OI
    for rows in range(0, weight_OI.shape[0], 1024):
        part = slice(rows, rows + 1024)
        error += float(torch.linalg.vector_norm(decoded_OI[part], dtype=torch.float64) ** 2)
        norm += float(torch.linalg.vector_norm(weight_OI[part], dtype=torch.float64) ** 2)
    return error, norm
