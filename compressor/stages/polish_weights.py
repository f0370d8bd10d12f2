"""Matrices made of codes that stay and scales that move, many at a time.

Legend: O out_features, I in_features, N groups (of one row each) of W columns, M matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from compressor.stages.polish_scales import Knob, Knobs

if TYPE_CHECKING:
    from compressor.schemes.base import FreeScales

# Formats of one byte that hold units exactly: E2M1 and E4M3 values and small integers, then other integers.
_UNIT_DTYPES = (torch.float8_e4m3fn, torch.int8, torch.float32)
# Matrices are put together up to so many values: three fp32 copies are alive at a time.
_LARGEST = 1 << 24


class Free:
    """A matrix taken apart, and the knob of its scales.

    Attributes:
        knob: of the scales.
        units_OI: the units in the smallest dtype that holds them.
        group: rows and columns that share a scale.
        divisor: fp32 [1] or None.
    """

    def __init__(self, free: FreeScales, knob: Knob, device: torch.device) -> None:
        self.knob = knob
        self.units_OI = _small(free.units_OI).to(device)
        self.group = free.group
        self.divisor = None if free.divisor is None else free.divisor.to(device)

    @property
    def kind(self) -> object:
        """Equal for matrices that can be computed together."""
        alone = self.knob.name if self.group[0] > 1 else ""
        return self.group, self.units_OI.dtype, self.knob.dtype, self.divisor is None, alone


def stacked(matrices: Sequence[tuple[int, Free]]) -> list[tuple[list[int], list[Free]]]:
    """Numbered matrices in stacks, each with the numbers of its members, in their order."""
    stacks: dict[object, list[tuple[list[int], list[Free]]]] = {}
    for number, matrix in matrices:
        found = stacks.setdefault(matrix.kind, [])
        values = sum(other.units_OI.numel() for other in found[-1][1]) if found else 0
        if not found or values + matrix.units_OI.numel() > _LARGEST:
            found.append(([], []))
        found[-1][0].append(number)
        found[-1][1].append(matrix)
    return [stack for found in stacks.values() for stack in found]


class Stack:
    """Matrices of one kind (see ``stacked``), computed together.

    ``knobs``: those of the members must follow one another there.
    """

    def __init__(self, members: Sequence[Free], knobs: Knobs) -> None:
        self._shapes = [(int(m.units_OI.shape[0]), int(m.units_OI.shape[1])) for m in members]
        self._rows, columns = members[0].group
        self._leaf = knobs.leaf([member.knob for member in members])
        self.units_NW = torch.cat([member.units_OI.reshape(-1, columns) for member in members])
        divisors = [member.divisor for member in members if member.divisor is not None]
        self._divisor_M = torch.cat(divisors) if divisors else None
        groups = [member.knob.start.numel() for member in members]
        self._groups_M = torch.tensor(groups, device=self.units_NW.device)

    def weights(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """[O, I] of each: in fp32 the numbers that the scheme's ``decode`` gives, with a gradient."""
        weights: torch.Tensor = _Scaled.apply(self._leaf, self, dtype)  # type: ignore[no-untyped-call]
        parts = torch.split(weights, [rows * columns for rows, columns in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def divided(self, stored: torch.Tensor) -> torch.Tensor:
        """Numbers of the stored scales over the tensor-level scales."""
        if self._divisor_M is None:
            return stored
        divisor = torch.repeat_interleave(self._divisor_M, self._groups_M, output_size=stored.numel())
        return stored / divisor.view(stored.shape)

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """[N, 1]: the scale of each group's rows."""
        if self._rows > 1:
            (rows, _), *_ = self._shapes
            scale = scale.repeat_interleave(self._rows, dim=0)[:rows]
        return scale.reshape(-1, 1)

    def gathered(self, gradient_N: torch.Tensor) -> torch.Tensor:
        """The gradient of what ``spread`` was given."""
        if self._rows == 1:
            return gradient_N.view(self._leaf.shape)
        (rows, _), *_ = self._shapes
        gradient_OC = gradient_N.view(rows, -1)
        padded = torch.nn.functional.pad(gradient_OC, (0, 0, 0, -rows % self._rows))
        return padded.view(-1, self._rows, gradient_OC.shape[1]).sum(dim=1)


class _Scaled(torch.autograd.Function):
    """Units times scales; nothing is kept for the way back but the units themselves."""

    @staticmethod
    def forward(ctx: Any, stored: torch.Tensor, stack: Stack, dtype: torch.dtype) -> torch.Tensor:
        """Flat, the weights of a stack."""
        ctx.stack = stack
        made_NW = stack.units_NW.float() * stack.spread(stack.divided(stored))
        return made_NW.to(dtype).flatten()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """That of the stored scales, added up in fp32."""
        stack: Stack = ctx.stack
        gradient_NW = gradients[0].view(stack.units_NW.shape).float()
        gathered = stack.gathered((gradient_NW * stack.units_NW.float()).sum(dim=-1))
        return stack.divided(gathered), None, None


def _small(units_OI: torch.Tensor) -> torch.Tensor:
    """The units in the smallest dtype that holds them."""
    return next(
        small for dtype in _UNIT_DTYPES if torch.equal((small := units_OI.to(dtype)).float(), units_OI)
    )


class Assembled(torch.autograd.Function):
    """A parameter put together of matrices that lie in it, as views tell; and its gradient cut up again."""

    @staticmethod
    def forward(
        ctx: Any, base: torch.Tensor, views: Sequence[Any], *weights_OI: torch.Tensor
    ) -> torch.Tensor:
        """``base`` with the matrix of each view (a function of the parameter) replaced."""
        ctx.views = views
        made = base.clone()
        for view, weight_OI in zip(views, weights_OI, strict=True):
            view(made).copy_(weight_OI)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The same views of the gradient."""
        return None, None, *(view(gradients[0]) for view in ctx.views)
