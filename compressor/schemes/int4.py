"""INT4 weights in groups of 128, 64 or 32, symmetric or with zero points."""

from __future__ import annotations

from typing import Literal

from compressor.schemes.base import indivisible
from compressor.schemes.grouped import Ratios, ratios_between
from compressor.schemes.packed_int import GroupSize, PackedInt, group_advice


class Int4(PackedInt):
    """Weight-only INT4.

    The full search tries scales from 0.56 to 1.5 of min-max (groups of 32 use up to 1.5, of 128 up to 1.13),
    then steps of 1/128, about the resolution of a bf16 scale; asymmetric groups take at most 1.25, and
    three zero points. Within 0.1 percent of the error of trying every step at once.
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
        return Ratios(ratios_between(0.5625, 1.5 if self.symmetric else 1.25, 32), fine)
