"""A solver: how the stored VALUES are chosen, given a scheme. Any solver works with any scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, WithJsonSchema

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from compressor.schemes.base import Scheme
    from compressor.solvers.learned import Learned
    from compressor.solvers.smooth import Smooth
    from compressor.solvers.statistics import Moments

# Of each weight of a block that is learned: where it begins, its offset, the best one, Adam's two moments, a
# gradient, and what rounding makes meanwhile.
LEARNED_BYTES = 32


@dataclass(frozen=True)
class Solved:
    """One solved matrix.

    Attributes:
        tensors: local name -> stored tensor, as ``scheme.outputs`` lists them.
        squared_error: sum over the matrix of (decoded - weight)^2, fp64.
        squared_norm: sum of weight^2, fp64; the relative error is squared_error / squared_norm.
        used: kind of the solver that chose the values: "rtn" where another one did no better.
        output_error: squared error of the matrix's output on the calibration text, beyond that of the real
            weights that the solver rounded, over the squared norm of that output; None without calibration.
        rtn_output_error: the same of plain round-to-nearest with searched scales.
        note: why another solver was used than asked for, as a sentence part, or None.
    """

    tensors: dict[str, torch.Tensor]
    squared_error: float
    squared_norm: float
    used: str = "rtn"
    output_error: float | None = None
    rtn_output_error: float | None = None
    note: str | None = None


class Solver(BaseModel):
    """Base of all solvers; also the recipe's spelling of one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str

    @property
    def needs_calibration(self) -> bool:
        """Whether the solver must see activations (then the weights stage is a walk, not a stream)."""
        return False

    @property
    def needs_moments(self) -> bool:
        """Whether ``solve_heard`` looks at its moments; a solver that needs calibration may do without."""
        return self.needs_calibration

    @property
    def label(self) -> str:
        """The solver as recipes spell it, without its options: ``gptq+learned``."""
        return self.kind

    @property
    def smoothing(self) -> Smooth | None:
        """The solver ``smooth`` where it folds scales into what lies before the matrices, else None."""
        return None

    @property
    def learning(self) -> Learned | None:
        """How the block is trained once all of its matrices are solved; None where it is not."""
        return None

    @property
    def bytes_per_s(self) -> float:
        """16-bit source bytes a second on two CPU cores: what the plan's time rests on."""
        raise NotImplementedError

    def solve(
        self, weights_OI: Sequence[torch.Tensor], scheme: Scheme, importance_I: torch.Tensor | None = None
    ) -> list[Solved]:
        """Solves the matrices of one fuse group (usually one matrix); any float dtype, on any device.

        ``importance_I``: positive weight of each input channel in the error, as far as it is known without
        data; a solver may leave it aside.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        raise NotImplementedError

    def solve_heard(
        self,
        weights_OI: Sequence[torch.Tensor],
        scheme: Scheme,
        moments: Moments,
        importance_I: torch.Tensor | None = None,
    ) -> list[Solved]:
        """As ``solve``, given what calibration measured of the inputs that the matrices share.

        A solver that needs no calibration leaves ``moments`` aside.
        """
        return self.solve(weights_OI, scheme, importance_I)

    def solve_groups(
        self,
        groups: Sequence[tuple[Sequence[torch.Tensor], Moments]],
        scheme: Scheme,
        importance_I: torch.Tensor | None = None,
    ) -> list[list[Solved]]:
        """``solve_heard`` of several groups with moments of their own, such as experts; perhaps at once."""
        return [self.solve_heard(weights_OI, scheme, moments, importance_I) for weights_OI, moments in groups]


def _parsed(value: Any) -> Solver:
    from compressor.solvers import parse_solver  # the table of solvers, some of which hold others

    return parse_solver(value)


InnerSolver = Annotated[
    SerializeAsAny[Solver],
    BeforeValidator(_parsed),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["kind"]}]}),
]
"""A field of a solver that takes any solver, by name or mapping."""
