"""A solver: how the stored VALUES are chosen, given a scheme. Any solver works with any scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from compressor.schemes.base import Scheme
    from compressor.solvers.statistics import Moments


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
