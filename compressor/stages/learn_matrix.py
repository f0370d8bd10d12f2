"""A stored matrix whose rounding and scales are learned: what it would be stored as, and steps of both.

What is learned is AutoRound's (arXiv:2309.05516, section 3): an offset of every weight within its cell of
the lattice, and a factor of every scale. Gradients pass the rounding as if there were none. The steps are
Adam's (arXiv:1412.6980): few tokens say little of most weights, and signs alone would move those as far as
any. A code stays while its scale moves, as solvers choose codes together.

Legend: O out_features, I in_features, C scale groups in a row, W columns of a group, B x C the groups as
stored, N groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compressor.numerics.groups import to_groups
from compressor.schemes.base import Scales, Scheme
from compressor.stages.training import as_stored

if TYPE_CHECKING:
    from compressor.numerics.lattice import Lattice

# An offset is this many cells at most: any weight can reach the neighbours of its code, few those after.
LARGEST_OFFSET = 0.5
# Factors of scales lie within this of 1.
LARGEST_CHANGE = 0.5
# A weight that the start solver put in another cell than its own begins so far from the middle, in gaps.
INSIDE = 0.45
# Factors move so much as offsets do in cells.
SCALE_RATE = 0.3
_BETAS = (0.9, 0.98)
_EPSILON = 1e-15


class LearnedMatrix:
    """One matrix; its stored values are those of the start solver until ``move`` is called.

    Args:
        weight_OI: the source's weights, fp32.
        scheme: how it is stored.
        tensors: as the start solver stored it.
        scales: whether scales are learned, where the format lets them be any numbers.
    """

    def __init__(
        self, weight_OI: torch.Tensor, scheme: Scheme, tensors: dict[str, torch.Tensor], *, scales: bool
    ) -> None:
        shape = (weight_OI.shape[0], weight_OI.shape[1])
        self._scheme, self._shape = scheme, shape
        tensors = {name: tensor.to(weight_OI.device) for name, tensor in tensors.items()}
        self._start = scheme.scales(tensors, *shape)
        lattice = scheme.lattice(self._start, *shape)
        self._groups = lattice.scale_OC.shape[1]
        stored_OI = scheme.decode(tensors, *shape)
        self._position_OCW = _begin(self._grouped(weight_OI), self._grouped(stored_OI), lattice)
        self._offset = Moved(torch.zeros_like(self._position_OCW), 0.0, LARGEST_OFFSET)
        self._factor: Moved | None = None
        free = scheme.free_scales(tensors, *shape) if scales else None
        if free is not None:
            ones_BC = torch.ones_like(self._start.scale, dtype=torch.float32)
            self._factor = Moved(ones_BC, 1.0, LARGEST_CHANGE)
            self._group, self._dtype = free.group, free.scale_BC.dtype

    def weight(self) -> torch.Tensor:
        """fp32 [O, I]: what an engine would compute with, if the matrix were stored as it is now."""
        lattice = self._lattice()
        return (self._codes(lattice) * lattice.scale_OC[..., None]).view(self._shape)

    def move(self, gradient_OI: torch.Tensor, rate: float) -> None:
        """One step against the gradients.

        Args:
            gradient_OI: of the loss, for each of ``weight``'s values.
            rate: cells that the offset of a weight moves at most, unless its gradients grow.
        """
        gradient_OCW = self._grouped(gradient_OI.float())
        if self._factor is not None:
            slope_OI = (gradient_OCW * self._codes(self._lattice())).view(self._shape)
            sums_N = to_groups(slope_OI, *self._group).sum(dim=1)
            self._factor.step(sums_N.view_as(self._factor.values), rate * SCALE_RATE)
        # The gradient of an offset is this times the width of its cell, of which Adam's steps do not depend.
        self._offset.step(gradient_OCW, rate)

    def keep(self) -> None:
        """Remembers the present state as the one to go back to."""
        for moved in self._learned():
            moved.keep()

    def go_back(self) -> None:
        """Takes up the state that was kept last; the start if none was."""
        for moved in self._learned():
            moved.go_back()

    def tensors(self) -> dict[str, torch.Tensor]:
        """As ``Scheme.encode`` gives them."""
        return self._scheme.encode(self.weight(), self._scales())

    def _learned(self) -> list[Moved]:
        return [self._offset] if self._factor is None else [self._offset, self._factor]

    def _grouped(self, matrix_OI: torch.Tensor) -> torch.Tensor:
        return matrix_OI.reshape(self._shape[0], self._groups, -1)

    def _scales(self) -> Scales:
        if self._factor is None:
            return self._start
        start_BC = self._start.scale.float()
        moved_BC = as_stored(start_BC * self._factor.values, self._dtype, start_BC)
        return replace(self._start, scale=moved_BC.to(self._start.scale.dtype))

    def _lattice(self) -> Lattice:
        return self._scheme.lattice(self._scales(), *self._shape)

    def _codes(self, lattice: Lattice) -> torch.Tensor:
        """Values of the codes [O, C, W], zero points taken off."""
        moved_OCW = self._position_OCW + self._offset.values * lattice.grid.gap(self._position_OCW)
        return lattice.grid.round(moved_OCW) - lattice.zero_OC[..., None]


class Moved:
    """Numbers on their way by Adam, within ``room`` of ``centre``; the state kept first is the start.

    Attributes:
        values: fp32, as they are now.
    """

    def __init__(self, values: torch.Tensor, centre: float, room: float) -> None:
        self.values = values
        self._low, self._high = centre - room, centre + room
        self._mean, self._square = torch.zeros_like(values), torch.zeros_like(values)
        self._best = values.clone()
        self._steps = 0

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """One step against the gradient."""
        self._steps += 1
        self._mean.lerp_(gradient, 1 - _BETAS[0])
        self._square.lerp_(gradient.square(), 1 - _BETAS[1])
        size = (self._square / (1 - _BETAS[1] ** self._steps)).sqrt_().add_(_EPSILON)
        self.values.addcdiv_(self._mean, size, value=-rate / (1 - _BETAS[0] ** self._steps))
        self.values.clamp_(self._low, self._high)

    def keep(self) -> None:
        """Remembers the values."""
        self._best.copy_(self.values)

    def go_back(self) -> None:
        """Takes up the values that were kept last."""
        self.values.copy_(self._best)


def _begin(weight_OCW: torch.Tensor, stored_OCW: torch.Tensor, lattice: Lattice) -> torch.Tensor:
    """The point of each stored code's cell that is next to the weight, in codes."""
    scale_OC1, zero_OC1, grid = lattice.scale_OC[..., None], lattice.zero_OC[..., None], lattice.grid
    code_OCW = grid.round(stored_OCW / scale_OC1 + zero_OC1)
    off_OCW = weight_OCW / scale_OC1 + zero_OC1 - code_OCW
    # The gap on the weight's side of the code: just beside it, for gaps differ on both sides of some values.
    beside_OCW = code_OCW + off_OCW.sign() * grid.gap(code_OCW) / 64
    limit_OCW = INSIDE * grid.gap(beside_OCW)
    return code_OCW + off_OCW.clamp(-limit_OCW, limit_OCW)
