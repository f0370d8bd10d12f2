"""INT4 weights in groups of 128, 64 or 32, symmetric or with zero points."""

from __future__ import annotations

from typing import Literal

from compressor.schemes.base import indivisible
from compressor.schemes.grouped import Ratios, ratios_between
from compressor.schemes.packed_int import GroupSize, PackedInt, group_advice

# Above these ratios to min-max, no more than 1 symmetric group in 10,000 of a real model has its best scale.
LARGEST_RATIO: dict[GroupSize, float] = {128: 1.1875, 64: 1.3125, 32: 1.5}


class Int4(PackedInt):
    """Weight-only INT4.

    The full search tries scales from 0.56 of min-max up to where 1 group in 10,000 gained, in steps of 1/32,
    then of 1/128 (about the resolution of a bf16 scale) around the best, with three zero points if
    asymmetric. Its error is within 0.3 percent of that of trying every step and zero point at once.
    """

    kind: Literal["int4"] = "int4"
    group_size: GroupSize = 128
    symmetric: bool = True

    @property
    def label(self) -> str:
        """See ``Scheme.label``."""
        return f"W4A16{'' if self.symmetric else '_ASYM'} g{self.group_size}"

    @property
    def _symmetric(self) -> bool:
        return self.symmetric

    @property
    def _bits(self) -> Literal[4, 8]:
        return 4

    def problem(self, out_features: int, in_features: int, *, fused: bool) -> str | None:
        """See ``Scheme.problem``."""
        if not self.symmetric and out_features % 8:
            return (
                f"out_features {out_features} is not a multiple of 8, the zero points in a word of "
                "asymmetric INT4: use symmetric: true, or leave the matrix in 16 bit with ignore"
            )
        advice = group_advice(in_features, self.group_size)
        return indivisible(out_features, in_features, self.group_size, "group of INT4", advice)

    def _ratios(self) -> Ratios:
        fine = tuple(step / 128 for step in (-3, -2, -1, 0, 1, 2, 3))
        high = LARGEST_RATIO[self.group_size] if self.symmetric else 1.25
        return Ratios(ratios_between(0.5625, high, 32), fine)
