"""GPTQ with any scheme: columns rounded in turn, each error made up for in the columns that follow.

Frantar et al., arXiv:2210.17323, with the source model's inputs as what the output is compared with, groups
whose scales are found again afterwards, and a fallback to round-to-nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compressor.solvers.base import Solved, Solver
from compressor.solvers.rtn import Rtn

if TYPE_CHECKING:
    import torch

    from compressor.schemes.base import Scheme
    from compressor.solvers.statistics import Moments

_BYTES_PER_S = 8e6


class Gptq(Solver):
    """GPTQ; a matrix whose output errs no less than with plain round-to-nearest keeps the latter.

    The correction is damped more than the rounding: fitted closely to few tokens, weights stray from the
    source's and serve other text worse.

    Extra memory beside the result: about four fp32 copies of the matrices of one group and a few of some of
    their rows (``rounding.SWEPT_WEIGHTS``), one of H, and panels of it in fp64 (``goal.FACTORED``).
    """

    kind: Literal["gptq"] = "gptq"
    damping: float = Field(
        default=0.03,
        gt=0.0,
        le=1.0,
        description="Added to H's diagonal, as a fraction of its mean, besides what few tokens call for; 10 "
        "and 100 times it where H is singular still.",
    )
    correction_damping: float = Field(
        default=0.2,
        gt=0.0,
        description="The same where weights are fitted to the inputs that the quantized model feeds: it "
        "holds them near the source's.",
    )
    activation_order: bool = Field(
        default=True,
        description="Columns with large inputs first; every column keeps its group and scale.",
    )
    passes: int = Field(
        default=1,
        ge=0,
        le=100,
        description="How often every group's scale and codes are chosen again, given all others; codes alone "
        "where the format's scales are those of whole rows or blocks.",
    )

    @property
    def needs_calibration(self) -> bool:
        """See ``Solver.needs_calibration``."""
        return True

    @property
    def bytes_per_s(self) -> float:
        """See ``Solver.bytes_per_s``; without the walk that hears the inputs."""
        return _BYTES_PER_S

    def solve(
        self, weights_OI: Sequence[torch.Tensor], scheme: Scheme, importance_I: torch.Tensor | None = None
    ) -> list[Solved]:
        """Plain round-to-nearest: for matrices that calibration never reaches."""
        return Rtn().solve(weights_OI, scheme, importance_I)

    def solve_heard(
        self,
        weights_OI: Sequence[torch.Tensor],
        scheme: Scheme,
        moments: Moments,
        importance_I: torch.Tensor | None = None,
    ) -> list[Solved]:
        """See ``Solver.solve_heard``; ``importance_I`` is for round-to-nearest, with which it is compared."""
        from compressor.solvers.rounding import solve_batch

        return solve_batch(self, [(weights_OI, moments)], scheme, importance_I)[0]

    def solve_groups(
        self,
        groups: Sequence[tuple[Sequence[torch.Tensor], Moments]],
        scheme: Scheme,
        importance_I: torch.Tensor | None = None,
    ) -> list[list[Solved]]:
        """See ``Solver.solve_groups``; on an accelerator, groups of the same shapes are solved at once."""
        from compressor.solvers.rounding import batches, solve_batch

        solved: list[list[Solved]] = [[] for _ in groups]
        for batch in batches(groups):
            for index, result in zip(
                batch, solve_batch(self, [groups[i] for i in batch], scheme, importance_I), strict=True
            ):
                solved[index] = result
        return solved
