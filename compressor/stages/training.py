"""What the stages that train have in common: rounding that gradients pass, and the order of the data.

Values are rounded on the way forward, and not at all on the way back (straight-through estimator,
arXiv:1308.3432): the loss is that of the stored numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compressor.model.routed import Rounding
    from compressor.schemes.base import Scheme


class _Straight(torch.autograd.Function):
    """What a function makes of a tensor, with the tensor's own gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, made: Rounding) -> torch.Tensor:
        """``made(x)``, of the same shape."""
        return made(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient as it is."""
        return gradients[0], None


def rounding(scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> Rounding:
    """What an engine makes of rows of inputs; the gradient passes as if they were not rounded.

    ``tensors``: the matrix's stored ones.
    """
    inputs = input_scales(tensors)

    @cache
    def there(device: torch.device) -> dict[str, torch.Tensor]:
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def made(x: torch.Tensor) -> torch.Tensor:
        return scheme.round_inputs(x.reshape(-1, x.shape[-1]), there(x.device)).view(x.shape)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        straight: torch.Tensor = _Straight.apply(x, made)  # type: ignore[no-untyped-call]
        return straight

    return rounded


def input_scales(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a matrix's stored tensors that tell how its inputs are rounded."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("input_")}


class RoundedOnce:
    """Rounding for several matrices that read the same input: the same tensor is rounded once.

    It and what became of it are held until another comes, or ``forget``.
    """

    def __init__(self, rounded: Rounding) -> None:
        self._rounded = rounded
        self._last: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows before -> rows after."""
        last = self._last
        if last is None or last[0] is not x or last[1] != x._version:
            last = self._last = (x, x._version, self._rounded(x))
        return last[2]

    def forget(self) -> None:
        """Lets go of the last input."""
        self._last = None


def as_stored(moved: torch.Tensor, dtype: torch.dtype, start: torch.Tensor) -> torch.Tensor:
    """fp32: ``moved`` rounded to what ``dtype`` holds; what would vanish is as in ``start``."""
    largest = torch.finfo(dtype).max
    rounded = moved.detach().clamp(-largest, largest).to(dtype).float()
    return torch.where((rounded == 0) & (start != 0), start, rounded)


def row_order(rows: int, count: int, seed: int) -> torch.Tensor:
    """int64 [count]: rows 0 to ``rows`` - 1 in a random order, and again in another, as often as needed."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(rows, generator=generator) for _ in range(ceil(count / rows))]
    return torch.cat(rounds)[:count]
