"""What a polish may move: scales, norms and biases, each number by a factor of its own that starts at one.

The codes stay. Values are rounded to what will be stored on the way forward, and not at all on the way back
(straight-through estimator, arXiv:1308.3432): the loss is that of the stored numbers.

Legend: O out_features, I in_features, B x C the groups as a matrix, W columns of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compressor.schemes.base import FreeScales

# Formats of one byte that hold units exactly: E2M1 and E4M3 values and small integers, then other integers.
_UNIT_DTYPES = (torch.float8_e4m3fn, torch.int8, torch.float32)


def straight(rounded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The values of ``rounded`` with the gradient of ``x``, which must be finite."""
    return rounded.detach() + (x - x.detach())


class Knob:
    """One stored tensor, every number of it times exp(p), with p zero at first.

    Attributes:
        name: of the stored tensor.
        start: fp32, its values before.
        exponent: fp32 leaf of the same shape, the p; a view of all knobs' (see ``Knobs``).

    Args:
        name: see above.
        stored: the tensor before.
        offset: what the model adds to the stored numbers before it multiplies by them.
        device: that computes.
    """

    def __init__(self, name: str, stored: torch.Tensor, offset: float, device: torch.device) -> None:
        self.name = name
        self.start = stored.to(device).float()
        self.exponent = torch.zeros(0)
        self._dtype = stored.dtype
        self._offset = offset

    def value(self) -> torch.Tensor:
        """fp32: what would be stored now, with a gradient for ``exponent``."""
        # In this form nothing at all changes while p is zero.
        moved = self.start + (self.start + self._offset) * self.exponent.expm1()
        return straight(self._rounded(moved), moved)

    def stored(self) -> torch.Tensor:
        """What would be stored now, in the stored dtype, on the CPU."""
        return self.value().detach().to(self._dtype).cpu()

    @property
    def is_sane(self) -> bool:
        """Whether all values are finite, and no sign changed unless the model adds an offset."""
        value = self.value().detach()
        signs = bool(self._offset) or torch.equal(value.sign(), self.start.sign())
        return signs and bool(value.isfinite().all())

    def _rounded(self, moved: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(self._dtype).max
        rounded = moved.detach().clamp(-largest, largest).to(self._dtype).float()
        return torch.where((rounded == 0) & (self.start != 0), self.start, rounded)


class Knobs:
    """All knobs of a model; their exponents and gradients lie one after another in two tensors.

    Attributes:
        exponents: fp32 [n].
        gradients: fp32 [n], filled by ``backward``.
    """

    def __init__(self, knobs: Iterable[Knob], device: torch.device) -> None:
        self._knobs = sorted(knobs, key=lambda knob: knob.name)
        sizes = [knob.start.numel() for knob in self._knobs]
        self.exponents = torch.zeros(sum(sizes), device=device)
        self.gradients = torch.zeros(sum(sizes), device=device)
        for knob, p, gradient in zip(
            self._knobs, torch.split(self.exponents, sizes), torch.split(self.gradients, sizes), strict=True
        ):
            knob.exponent = p.view(knob.start.shape).requires_grad_()
            knob.exponent.grad = gradient.view(knob.start.shape)

    @property
    def is_sane(self) -> bool:
        """Whether every value could be stored."""
        return all(knob.is_sane for knob in self._knobs)

    def changed(self) -> dict[str, torch.Tensor]:
        """Name -> stored tensor of all knobs whose stored values are others than before."""
        with torch.no_grad():
            return {
                knob.name: knob.stored() for knob in self._knobs if not torch.equal(knob.value(), knob.start)
            }


class Matrix:
    """A matrix whose codes stay: ``weight`` computes it from the scales as they are now.

    Args:
        free: the stored tensors taken apart.
        knob: of the scales.
        device: that computes.
    """

    def __init__(self, free: FreeScales, knob: Knob, device: torch.device) -> None:
        self.knob = knob
        self._rows, self._columns = free.group
        self._divisor = None if free.divisor is None else free.divisor.to(device)
        self._units_OI = _small(free.units_OI).to(device)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I]: in fp32 the numbers that the scheme's ``decode`` gives."""
        scale_BC = self.knob.value()
        if self._divisor is not None:
            scale_BC = scale_BC / self._divisor
        out_features, in_features = self._units_OI.shape
        scale_OC = scale_BC
        if self._rows > 1:
            scale_OC = scale_BC.repeat_interleave(self._rows, dim=0)[:out_features]
        units_OCW = self._units_OI.view(out_features, -1, self._columns).float()
        return (units_OCW * scale_OC[..., None]).view(out_features, in_features).to(dtype)


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
