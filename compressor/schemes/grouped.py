"""What the formats with one scale a group have in common: all but NVFP4, which adds a tensor-level scale.

Legend: O out_features, I in_features, B x C the groups as a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.schemes.base import FreeScales, Scales, Scheme, Search

if TYPE_CHECKING:
    import torch

    from compressor.numerics.grids import Grid
    from compressor.numerics.lattice import Lattice


@dataclass(frozen=True)
class Ratios:
    """Which scales a search tries, relative to the min-max scale.

    Attributes:
        coarse: tried first; the min-max scale itself is always a candidate.
        fine: added to the best ratio in a second round; empty for no second round.
    """

    coarse: tuple[float, ...]
    fine: tuple[float, ...] = ()


def ratios_between(low: float, high: float, steps_per_unit: int) -> tuple[float, ...]:
    """Evenly spaced ratios from ``low`` to ``high``, both included."""
    first, last = round(low * steps_per_unit), round(high * steps_per_unit)
    return tuple(step / steps_per_unit for step in range(first, last + 1))


def scale_dtype(weight_dtype: str) -> str:
    """The safetensors dtype of scales that the library stores in the model's dtype: results are 16 bit."""
    return "F16" if weight_dtype == "F16" else "BF16"


class GroupedScheme(Scheme):
    """A scheme whose groups are independent; subclasses say which groups, which values and how stored."""

    @property
    def _codes_name(self) -> str:
        """Local name of the stored codes."""
        return "weight"

    def _group(self, in_features: int) -> tuple[int, int]:
        """Rows and columns of one group."""
        raise NotImplementedError

    def _grid(self) -> Grid:
        """The values of the codes."""
        raise NotImplementedError

    def _ratios(self) -> Ratios:
        """Which scales the full search tries."""
        raise NotImplementedError

    @property
    def _scales_are_free(self) -> bool:
        """Whether groups have scales of their own that can be any floating-point number."""
        return True

    def _near_ratios(self) -> tuple[float, ...]:
        """Scales that a group may take instead of its own, relative to it; none if groups are large."""
        return ()

    def _store(self, codes_OI: torch.Tensor) -> torch.Tensor:
        """Codes of the grid -> as stored, rows kept."""
        return codes_OI

    def _load(self, stored: torch.Tensor, in_features: int) -> torch.Tensor:
        """Codes as stored -> codes of the grid [O, I]."""
        return stored

    def _store_scale(self, scale_BC: torch.Tensor) -> torch.Tensor:
        """Scales as ``fit`` gives them -> as stored."""
        return scale_BC

    def _load_scale(self, stored: torch.Tensor) -> torch.Tensor:
        """Stored scales -> fp32."""
        return stored.float()

    def _extras(self, shape: tuple[int, int], scales: Scales) -> dict[str, torch.Tensor]:
        """Further stored tensors."""
        return {}

    def _load_zero_point(self, tensors: dict[str, torch.Tensor], out_features: int) -> torch.Tensor | None:
        """fp32 [B, C] zero points, or None for symmetric formats."""
        return None

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

    def encode(self, weight_OI: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        """See ``Scheme.encode``; extra memory beside the result: one chunk of rows."""
        import torch

        from compressor.schemes.group_codes import encode_chunks

        out_features, in_features = weight_OI.shape
        chunks = encode_chunks(weight_OI, scales, self._group(in_features), self._grid())
        codes = torch.cat([self._store(codes_OI) for codes_OI in chunks])
        stored = {self._codes_name: codes, "weight_scale": self._store_scale(scales.scale)}
        return stored | self._extras((out_features, in_features), scales)

    def decode(self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int) -> torch.Tensor:
        """See ``Scheme.decode``; extra memory beside the result: one chunk of rows."""
        import torch

        from compressor.numerics.groups import row_chunks
        from compressor.schemes.group_codes import decode_rows

        codes, scale_BC = tensors[self._codes_name], self._load_scale(tensors["weight_scale"])
        zero_BC = self._load_zero_point(tensors, out_features)
        rows, columns = self._group(in_features)
        weight_OI = torch.empty(out_features, in_features, device=codes.device)
        for chunk in row_chunks(out_features, in_features, rows):
            part = slice(chunk.start // rows, -(-chunk.stop // rows))
            codes_OI = self._load(codes[chunk], in_features)
            zero = None if zero_BC is None else zero_BC[part]
            weight_OI[chunk] = decode_rows(codes_OI, scale_BC[part], zero, (rows, columns), self._grid())
        return weight_OI

    def scales(self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int) -> Scales:
        """See ``Scheme.scales``."""
        import torch

        stored = tensors["weight_scale"]
        # only floating-point scales are stored as they are
        scale = stored if stored.is_floating_point() else self._load_scale(stored)
        zero_BC = self._load_zero_point(tensors, out_features)
        return Scales(scale, None if zero_BC is None else zero_BC.to(torch.int8))

    def free_scales(
        self, tensors: dict[str, torch.Tensor], out_features: int, in_features: int
    ) -> FreeScales | None:
        """See ``Scheme.free_scales``."""
        import torch

        if not self._scales_are_free:
            return None
        scale_BC = tensors["weight_scale"]
        units_OI = self.decode(
            tensors | {"weight_scale": torch.ones_like(scale_BC)}, out_features, in_features
        )
        return FreeScales(units_OI, scale_BC, self._group(in_features))

    def lattice(self, scales: Scales, out_features: int, in_features: int) -> Lattice:
        """See ``Scheme.lattice``."""
        import torch

        from compressor.numerics.lattice import Lattice

        rows = self._group(in_features)[0]
        scale_OC = scales.scale.float().repeat_interleave(rows, dim=0)[:out_features]
        zero_OC = torch.zeros_like(scale_OC) if scales.zero_point is None else scales.zero_point.float()
        return Lattice(self._grid(), scale_OC, zero_OC)

    def near(self, scales: Scales, in_features: int) -> list[Scales]:
        """See ``Scheme.near``."""
        stored = [_times(scales.scale, ratio) for ratio in (1.0, *self._near_ratios())]
        if scales.zero_point is None:
            return [Scales(scale) for scale in stored]
        low, high = self._grid().low, self._grid().high
        shifted = [(scales.zero_point + step).clamp(low, high) for step in (-1, 1)]
        return [Scales(scale, scales.zero_point) for scale in stored] + [
            Scales(scales.scale, zero) for zero in shifted
        ]


def _times(scale_BC: torch.Tensor, ratio: float) -> torch.Tensor:
    """The scales times ``ratio`` as stored; those that would leave the range of normal numbers stay."""
    import torch

    info = torch.finfo(scale_BC.dtype)
    scaled_BC = scale_BC.float() * ratio
    kept_BC = (scaled_BC >= info.tiny) & (scaled_BC <= info.max)
    return torch.where(kept_BC, scaled_BC.to(scale_BC.dtype), scale_BC)
