"""Round to nearest: each value goes to the nearest one that its scale allows; only the scales are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compressor.schemes.base import Search
from compressor.solvers.base import Solved, Solver

if TYPE_CHECKING:
    import torch

    from compressor.schemes.base import Scheme


_SEARCHED_BYTES_PER_S = 25e6
_MINMAX_BYTES_PER_S = 100e6


class Rtn(Solver):
    """Round to nearest, with scales found by ``search``: the best for the error, or of the range (faster).

    A norm's output has a second moment of about its squared weight in each channel, whatever the text: that
    is the diagonal of the Hessian that calibration would measure, as far as it is known without data.

    Extra memory: the result, the decoded matrix in fp32 and temporaries of one chunk of rows; 350 to 410 MB
    were measured for a matrix of 5120 x 8192, whose fp32 copy has 168 MB.
    """

    kind: Literal["rtn"] = "rtn"
    search: Search = Field(
        default="full",
        description="full: scales of least error among those that the format stores; minmax: of the range.",
    )
    importance: Literal["norm", "none"] = Field(
        default="norm",
        description="norm: errors in an input channel count by the squared weight of the norm before the "
        "layer, where there is one; none: all count alike. Only for search full.",
    )

    @property
    def bytes_per_s(self) -> float:
        """See ``Solver.bytes_per_s``; cautious: with start-up on a small model, NVFP4 (bench/results)."""
        return _SEARCHED_BYTES_PER_S if self.search == "full" else _MINMAX_BYTES_PER_S

    def solve(
        self, weights_OI: Sequence[torch.Tensor], scheme: Scheme, importance_I: torch.Tensor | None = None
    ) -> list[Solved]:
        """See ``Solver.solve``."""
        import torch

        from compressor.solvers.measure import check_finite, squares

        # An fp64 weight may be larger than fp32 holds: that shows as not finite.
        narrow = [w.float() if w.dtype == torch.float64 else w for w in weights_OI]
        for weight_OI in narrow:
            check_finite(weight_OI)
        if self.importance == "none":
            importance_I = None
        fitted = scheme.fit(narrow, search=self.search, importance_I=importance_I)
        solved = []
        for weight_OI, scales in zip(narrow, fitted, strict=True):
            tensors = scheme.encode(weight_OI, scales)
            decoded_OI = scheme.decode(tensors, *weight_OI.shape)
            solved.append(Solved(tensors, *squares(weight_OI, decoded_OI)))
        return solved
