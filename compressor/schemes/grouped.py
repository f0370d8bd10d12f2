"""What the formats with one scale a group have in common: all but NVFP4, which adds a tensor-level scale.

Legend: O out_features, I in_features, G groups along I, B rows of groups (O, or O / 128 for blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.schemes.base import Scales, Scheme, Search

if TYPE_CHECKING:
    import torch

    from compressor.numerics.scale_search import Grid


@dataclass(frozen=True)
class Ratios:
    """Which scales a search tries, relative to the min-max scale.

    Attributes:
        coarse: tried first, after the min-max scale itself.
        fine: added to the best coarse ratio in a second round; empty for none.
    """

    coarse: tuple[float, ...]
    fine: tuple[float, ...] = ()


def ratios_between(low: float, high: float, steps_per_unit: int) -> tuple[float, ...]:
    """Ratios from ``low`` to ``high``, both included."""
    first, last = round(low * steps_per_unit), round(high * steps_per_unit)
    return tuple(step / steps_per_unit for step in range(first, last + 1))


class GroupedScheme(Scheme):
    """A scheme whose groups are independent; subclasses say which groups, which values and how stored."""

    def _group(self, in_features: int) -> tuple[int, int]:
        """Rows and columns of one group."""
        raise NotImplementedError

    def _grid(self) -> Grid:
        """The values of the codes."""
        raise NotImplementedError

    def _ratios(self) -> Ratios:
        """Which scales the full search tries."""
        raise NotImplementedError

    def _store(self, values_OI: torch.Tensor) -> torch.Tensor:
        """Values of the grid (fp32) -> the stored tensor, rows kept."""
        raise NotImplementedError

    def _load(self, stored: torch.Tensor, in_features: int) -> torch.Tensor:
        """The stored tensor -> fp32 [O, I] values of the grid."""
        raise NotImplementedError

    def _codes_name(self) -> str:
        """Local name of the stored codes."""
        return "weight"

    def fit(
        self,
        weights_OI: Sequence[torch.Tensor],
        *,
        search: Search,
        importance_I: torch.Tensor | None = None,
    ) -> list[Scales]:
        """See ``Scheme.fit``; each matrix is fitted by itself."""
        from compressor.schemes.group_fit import fit_matrix

        args = self.ct_scheme([]).weights
        assert args is not None
        ratios = self._ratios() if search == "full" else None
        return [
            fit_matrix(w, args, self._group(w.shape[1]), self._grid(), ratios, importance_I)
            for w in weights_OI
        ]
