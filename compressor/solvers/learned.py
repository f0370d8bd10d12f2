"""Rounding and scales of all matrices of a block learned together: its output is to be the source's.

Cheng et al., arXiv:2309.05516 (AutoRound): an offset of every weight within its cell of the lattice and a
factor of every scale, here with Adam. The walk does the work (``stages/learn.py``): a solver sees one fuse
group only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from compressor.solvers.base import InnerSolver, Solved, Solver
from compressor.solvers.rtn import Rtn

if TYPE_CHECKING:
    import torch

    from compressor.schemes.base import Scheme
    from compressor.solvers.statistics import Moments

# Cells that an offset could move in all steps, twice. Tried on single layers of one small model.
_REACH = 0.8
_HEARD_REACH = 0.3


class Learned(Solver):
    """Learns from what ``start`` chose; a block that errs no less afterwards keeps that.

    Extra memory: about 32 bytes for every quantized weight of a block, and what one batch of calibration
    tokens leaves behind for the way back through the block.
    """

    kind: Literal["learned"] = "learned"
    start: InnerSolver = Field(default_factory=Rtn, description="The solver that chooses what to start from.")
    steps: int = Field(default=200, ge=1, le=100_000, description="Of Adam, for each block.")
    learning_rate: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="Of the first step, in cells of the lattice; it falls linearly to zero. By default 0.8 / "
        "steps; 0.3 / steps after a solver that has measured inputs, which there is little left to better.",
    )
    scales: bool = Field(
        default=True, description="Whether scales are learned as well, where the format's are free numbers."
    )
    seed: int = Field(default=0, ge=0, description="Of the order of the calibration batches.")

    @field_validator("start")
    @classmethod
    def _can_start(cls, start: Solver) -> Solver:
        if start.smoothing is not None:
            raise ValueError(
                f"learned cannot start from {start.label}, since smooth comes before all else: write "
                "{kind: smooth, then: {kind: learned, ...}}"
            )
        if start.learning is not None or start.kind == "llmcompressor":
            raise ValueError(f"learned cannot start from {start.label}: use rtn or gptq")
        return start

    @property
    def needs_calibration(self) -> bool:
        """See ``Solver.needs_calibration``."""
        return True

    @property
    def needs_moments(self) -> bool:
        """See ``Solver.needs_moments``: as the solver that it starts from."""
        return self.start.needs_moments

    @property
    def bytes_per_s(self) -> float:
        """See ``Solver.bytes_per_s``: of the solver that it starts from."""
        return self.start.bytes_per_s

    @property
    def label(self) -> str:
        """See ``Solver.label``."""
        return self.kind if self.start.kind == "rtn" else f"{self.start.label}+{self.kind}"

    @property
    def learning(self) -> Learned:
        """See ``Solver.learning``."""
        return self

    @property
    def first_rate(self) -> float:
        """The learning rate of the first step."""
        reach = _HEARD_REACH if self.start.needs_moments else _REACH
        return self.learning_rate or reach / self.steps

    def solve(
        self, weights_OI: Sequence[torch.Tensor], scheme: Scheme, importance_I: torch.Tensor | None = None
    ) -> list[Solved]:
        """What there is to start from."""
        return self.start.solve(weights_OI, scheme, importance_I)

    def solve_heard(
        self,
        weights_OI: Sequence[torch.Tensor],
        scheme: Scheme,
        moments: Moments,
        importance_I: torch.Tensor | None = None,
    ) -> list[Solved]:
        """What there is to start from."""
        return self.start.solve_heard(weights_OI, scheme, moments, importance_I)

    def solve_groups(
        self,
        groups: Sequence[tuple[Sequence[torch.Tensor], Moments]],
        scheme: Scheme,
        importance_I: torch.Tensor | None = None,
    ) -> list[list[Solved]]:
        """What there is to start from."""
        return self.start.solve_groups(groups, scheme, importance_I)
