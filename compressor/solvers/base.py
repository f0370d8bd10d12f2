"""A solver: how the stored VALUES are chosen, given a scheme. Any solver works with any scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from compressor.schemes.base import Scheme


@dataclass(frozen=True)
class Solved:
    """One solved matrix.

    Attributes:
        tensors: local name -> stored tensor, as ``scheme.outputs`` lists them.
        squared_error: sum over the matrix of (decoded - weight)^2, fp64.
        squared_norm: sum of weight^2, fp64; the relative error is squared_error / squared_norm.
    """

    tensors: dict[str, torch.Tensor]
    squared_error: float
    squared_norm: float


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
