"""What a polish may move: scales, norms and biases, each number by a factor of its own that starts at one.

The codes stay; gradients pass the rounding to what will be stored (``training.py``). All numbers lie one
after another, so that a step takes a few operations for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from compressor.stages.training import as_stored


class Knob:
    """One stored tensor, every number of it times exp(p), with p zero at first.

    Attributes:
        name: of the stored tensor.
        start: fp32, its values before.
        offset: what the model adds to the stored numbers before it multiplies by them.
        dtype: the stored one.
        value: fp32 leaf, what would be stored now; with the gradient of the numbers (see ``Knobs``).
    """

    def __init__(self, name: str, stored: torch.Tensor, offset: float, device: torch.device) -> None:
        self.name = name
        self.start = stored.to(device).float()
        self.offset = offset
        self.dtype = stored.dtype
        self.value = self.start


class Knobs:
    """All knobs of a model; ``put`` moves them. Knobs of one dtype stay in the order given.

    Attributes:
        exponents: fp32 [n], all p; changed by ``put`` alone.
    """

    def __init__(self, knobs: Iterable[Knob], device: torch.device) -> None:
        self._knobs = sorted(knobs, key=lambda knob: str(knob.dtype))
        self._first: dict[str, int] = {}
        self._dtypes: dict[torch.dtype, slice] = {}
        last = 0
        for knob in self._knobs:
            self._first[knob.name] = last
            begun = self._dtypes.get(knob.dtype, slice(last, last)).start
            last += knob.start.numel()
            self._dtypes[knob.dtype] = slice(begun, last)
        empty = [torch.empty(0, device=device)]
        self._start = torch.cat(empty + [knob.start.flatten() for knob in self._knobs])
        # what exp(p) multiplies
        self._moving = torch.cat(empty + [(knob.start + knob.offset).flatten() for knob in self._knobs])
        self._fixed_sign = torch.cat(
            [empty[0].bool()] + [torch.full_like(k.start, not k.offset).flatten().bool() for k in self._knobs]
        )
        self._values, self._of_values = self._start.clone(), torch.zeros_like(self._start)
        self.exponents = torch.zeros_like(self._start)
        for knob in self._knobs:
            knob.start = self._start[self._part([knob])].view(knob.start.shape)
            knob.value = self.leaf([knob])

    def _part(self, knobs: Sequence[Knob]) -> slice:
        first = self._first[knobs[0].name]
        last = first
        for knob in knobs:
            assert self._first[knob.name] == last, "the knobs do not follow one another"
            last += knob.start.numel()
        return slice(first, last)

    def leaf(self, knobs: Sequence[Knob]) -> torch.Tensor:
        """fp32: the values of knobs that follow one another, flat if they are several; follows ``put``."""
        part, shape = self._part(knobs), knobs[0].start.shape if len(knobs) == 1 else (-1,)
        leaf = self._values[part].view(shape).requires_grad_()
        leaf.grad = self._of_values[part].view(shape)
        return leaf

    @torch.no_grad()
    def put(self, exponents: torch.Tensor) -> None:
        """Moves all numbers: the p are ``exponents`` now."""
        self.exponents.copy_(exponents)
        # In this form nothing at all changes while p is zero.
        moved = self._start + self._moving * self.exponents.expm1()
        for dtype, part in self._dtypes.items():
            self._values[part] = as_stored(moved[part], dtype, self._start[part])

    def clear_gradients(self) -> None:
        """Before the first ``backward`` of a step."""
        self._of_values.zero_()

    @torch.no_grad()
    def gradients(self) -> torch.Tensor:
        """fp32 [n], of the p: what all ``backward`` since ``clear_gradients`` add up to."""
        return self._of_values * self._moving * self.exponents.exp()

    @property
    def is_sane(self) -> bool:
        """Whether all values are finite, and no sign changed unless the model adds an offset."""
        kept = self._values.sign() == self._start.sign()
        return bool(((kept | ~self._fixed_sign) & self._values.isfinite()).all())

    def changed(self) -> dict[str, torch.Tensor]:
        """Name -> tensor in the stored dtype, on the CPU, of all knobs whose values changed."""
        return {
            knob.name: knob.value.detach().to(knob.dtype).cpu()
            for knob in self._knobs
            if not torch.equal(knob.value.detach(), knob.start)
        }
