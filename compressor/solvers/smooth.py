"""Per-channel scales folded into what makes an input, before another solver rounds its readers.

Lin et al., arXiv:2306.00978 (AWQ), section 3.2, and Xiao et al., arXiv:2211.10438 (SmoothQuant), section 4.
The walk does the work (``stages/smoothing.py``): a solver sees one fuse group only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from compressor.schemes.base import Search
from compressor.solvers.base import InnerSolver, Solved, Solver
from compressor.solvers.rtn import Rtn

if TYPE_CHECKING:
    import torch

    from compressor.schemes.base import Scheme
    from compressor.solvers.learned import Learned
    from compressor.solvers.statistics import Moments

# Times that the matrices are rounded to compare scales (``stages/smoothing.py``).
_TRIED = 11
# Rows on which errors are measured, spread over all batches.
ROWS = 512
# Experts whose matrices are measured while exponents are compared, evenly chosen; all are in the last check.
MOST_EXPERTS = 16


class Smooth(Solver):
    """Scales from the sizes of inputs and weights, with the exponent that errs least; then another solver.

    An input keeps its scales of one unless the errors of its quantized readers' outputs, summed, become less;
    one of them may err more. The matrix whose rows are divided is not judged. Errors of weights that are
    reported are relative to the scaled weights.

    Extra memory: the sampled inputs of a block, some fp32 copies of the largest matrices that share a scale,
    and in a 16-bit walk the block's matrices as they were (``planner/smoothed.py``).
    """

    kind: Literal["smooth"] = "smooth"
    then: InnerSolver = Field(default_factory=Rtn, description="The solver that rounds the scaled weights.")
    search: Search = Field(
        default="full",
        description="How the scales of the format are found while exponents are compared: full, as rtn does, "
        "or minmax, which is faster and may prefer others.",
    )

    @field_validator("then")
    @classmethod
    def _can_follow(cls, then: Solver) -> Solver:
        if then.smoothing is not None or then.kind == "llmcompressor":
            raise ValueError(f"{then.label} cannot follow smooth: use rtn, gptq or learned")
        return then

    @property
    def needs_calibration(self) -> bool:
        """See ``Solver.needs_calibration``."""
        return True

    @property
    def needs_moments(self) -> bool:
        """See ``Solver.needs_moments``: as the solver that follows."""
        return self.then.needs_moments

    @property
    def bytes_per_s(self) -> float:
        """See ``Solver.bytes_per_s``: what is tried costs as much as rtn, each time."""
        tried = _TRIED / Rtn(search=self.search).bytes_per_s
        return 1.0 / (1.0 / self.then.bytes_per_s + tried)

    @property
    def label(self) -> str:
        """See ``Solver.label``."""
        return self.kind if self.then.kind == "rtn" else f"{self.kind}+{self.then.label}"

    @property
    def smoothing(self) -> Smooth:
        """See ``Solver.smoothing``."""
        return self

    @property
    def learning(self) -> Learned | None:
        """See ``Solver.learning``."""
        return self.then.learning

    def solve(
        self, weights_OI: Sequence[torch.Tensor], scheme: Scheme, importance_I: torch.Tensor | None = None
    ) -> list[Solved]:
        """What the solver that follows makes of weights that are scaled already."""
        return self.then.solve(weights_OI, scheme, importance_I)

    def solve_heard(
        self,
        weights_OI: Sequence[torch.Tensor],
        scheme: Scheme,
        moments: Moments,
        importance_I: torch.Tensor | None = None,
    ) -> list[Solved]:
        """What the solver that follows makes of weights that are scaled already."""
        return self.then.solve_heard(weights_OI, scheme, moments, importance_I)

    def solve_groups(
        self,
        groups: Sequence[tuple[Sequence[torch.Tensor], Moments]],
        scheme: Scheme,
        importance_I: torch.Tensor | None = None,
    ) -> list[list[Solved]]:
        """What the solver that follows makes of weights that are scaled already."""
        return self.then.solve_groups(groups, scheme, importance_I)
