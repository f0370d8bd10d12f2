"""Scales of matrices whose groups have a scale each. Imported only where arithmetic is done.

Legend: O out_features, I in_features, N groups of G values, K candidates of a group, B x C the groups as a
matrix, P groups in a row.
"""

from __future__ import annotations

from math import frexp
from typing import TYPE_CHECKING

import torch

from compressor.kernels import best_candidate
from compressor.numerics.groups import importance_groups, to_groups
from compressor.schemes.base import Scales
from compressor.schemes.group_codes import group_chunks
from compressor.schemes.grouped import Ratios
from compressor.schemes.ranges import group_ranges, range_scales, storage_dtype

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

    from compressor.numerics.grids import Grid

# E8M0 holds 2**-127 to 2**127.
E8M0_RANGE = (2.0**-127, 2.0**127)


def fit_matrix(
    weight_OI: torch.Tensor,
    args: QuantizationArgs,
    group: tuple[int, int],
    grid: Grid,
    ratios: Ratios | None,
    importance_I: torch.Tensor | None,
) -> Scales:
    """Scales [B, C] of one matrix: of the range, or the best near it where ``ratios`` says which to try.

    The powers of two of the E2M1 grid are returned as fp32, others in the dtype in which they are stored.
    Extra memory: the groups' parameters, and temporaries of one chunk of rows (about 200 MB).
    """
    low_BC, high_BC = group_ranges(weight_OI, *group)
    dtype = storage_dtype(weight_OI)
    if grid.kind == "e2m1":  # a power of two far from 1 is no fp16 number
        low_BC, high_BC, dtype = low_BC.float(), high_BC.float(), torch.float32
    start = range_scales(low_BC, high_BC, args, dtype=dtype)
    if grid.kind == "e2m1":
        start = Scales(start.scale.clamp(*E8M0_RANGE))
    if ratios is None:
        return start
    if importance_I is None:
        importance_I = torch.ones(weight_OI.shape[1], device=weight_OI.device)
    h_PG = importance_groups(importance_I.float() / importance_I.max(), *group)
    unit = _unit(low_BC, high_BC)
    scale_BC = torch.empty_like(start.scale)
    zero_BC = None if start.zero_point is None else torch.empty_like(start.zero_point)
    for chunk, part in group_chunks(weight_OI, group):
        w_NG = to_groups(weight_OI[chunk].float(), *group) * unit
        search = _Search(w_NG, h_PG, low_BC[part], high_BC[part], grid, unit)
        zero_N = None if start.zero_point is None else start.zero_point[part].flatten()
        scale_N, zero_N = search.best(start.scale[part].flatten(), zero_N, ratios)
        scale_BC[part] = scale_N.view_as(scale_BC[part])
        if zero_BC is not None and zero_N is not None:
            zero_BC[part] = zero_N.view_as(zero_BC[part])
    return Scales(scale_BC, zero_BC)


class _Search:
    """The search over the groups of one chunk."""

    def __init__(
        self,
        w_NG: torch.Tensor,
        h_PG: torch.Tensor,
        low_BC: torch.Tensor,
        high_BC: torch.Tensor,
        grid: Grid,
        unit: float,
    ) -> None:
        self._w_NG, self._h_PG = w_NG, h_PG
        self._low_N1, self._high_N1 = low_BC.reshape(-1, 1).float(), high_BC.reshape(-1, 1).float()
        self._grid = grid
        self._unit = unit

    def best(
        self, start_N: torch.Tensor, zero_N: torch.Tensor | None, ratios: Ratios
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points [N], in the dtypes of the min-max ones that the search starts from.

        The coarse ratios are tried with the zero point that centres the clipped range, the fine ones with
        its neighbours too. What was best before stays a candidate, so the result is never worse.
        """
        asymmetric = zero_N is not None
        scale_N, best_zero_N = (
            start_N,
            torch.zeros_like(start_N).float() if zero_N is None else zero_N.float(),
        )
        ratio_N1 = torch.zeros_like(start_N)[:, None].float()
        rounds = ((ratios.coarse, (0.0,)), (ratios.fine, (-1.0, 0.0, 1.0)))
        for steps, offsets in rounds[: 2 if ratios.fine else 1]:
            ratio_NK = ratio_N1 + torch.tensor(steps, device=start_N.device)
            scale_NK = self._stored(start_N, ratio_NK)
            zero_NK = torch.zeros_like(scale_NK)
            if asymmetric:
                scale_NK, zero_NK = self._with_zero_points(scale_NK, offsets)
            scale_NK = torch.cat((scale_N[:, None].float(), scale_NK), dim=1)
            zero_NK = torch.cat((best_zero_N[:, None], zero_NK), dim=1)
            index_N1 = best_candidate(self._w_NG, self._h_PG, scale_NK * self._unit, zero_NK, self._grid)[
                :, None
            ]
            scale_N = scale_NK.gather(1, index_N1)[:, 0].to(start_N.dtype)
            best_zero_N = zero_NK.gather(1, index_N1)[:, 0]
            ratio_N1 = (scale_N.float() / start_N.float())[:, None]
        return scale_N, None if zero_N is None else best_zero_N.to(zero_N.dtype)

    def _stored(self, start_N: torch.Tensor, ratio_NK: torch.Tensor) -> torch.Tensor:
        """fp32 candidates as the format stores them; those that vanish become the first."""
        start_N1 = start_N[:, None].float()
        if self._grid.kind == "e2m1":
            return (start_N1 * ratio_NK).clamp(*E8M0_RANGE)
        scale_NK = (start_N1 * ratio_NK).clamp(max=torch.finfo(start_N.dtype).max).to(start_N.dtype).float()
        return torch.where(scale_NK > 0, scale_NK, start_N1)

    def _with_zero_points(
        self, scale_NK: torch.Tensor, offsets: tuple[float, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each scale with the zero points around the one that clips both ends of the range alike."""
        low, high = self._grid.low, self._grid.high
        centre_NK = (low - self._low_N1 / scale_NK + high - self._high_N1 / scale_NK) / 2
        near_K = torch.tensor(offsets, device=scale_NK.device)
        zero_NKZ = (centre_NK.round()[..., None] + near_K).clamp(low, high)
        return scale_NK.repeat_interleave(len(offsets), dim=1), zero_NKZ.flatten(1)


def _unit(low_BC: torch.Tensor, high_BC: torch.Tensor) -> float:
    """A power of two that brings the largest value near 1, so that squares neither overflow nor vanish."""
    largest = max(-float(low_BC.min()), float(high_BC.max()))
    return 2.0 ** max(min(-frexp(largest)[1], 126), -126) if largest > 0 else 1.0
