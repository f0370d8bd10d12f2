"""The steps of the solver ``gptq``. Imported only where arithmetic is done.

Legend: B groups of matrices, stacked to O rows each, I columns; C scale groups in a row, W columns of a scale
group, K candidate scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import frexp
from typing import TYPE_CHECKING

import torch

from compressor.kernels.columns import refit, sweep
from compressor.numerics.lattice import concatenate
from compressor.schemes.base import Scales, Scheme
from compressor.solvers.base import Solved
from compressor.solvers.goal import Damped, Goal, divide, factor, feedback, reorder, restore
from compressor.solvers.measure import squares
from compressor.solvers.rtn import Rtn
from compressor.solvers.statistics import Moments

if TYPE_CHECKING:
    from compressor.solvers.gptq import Gptq

Heard = tuple[Sequence[torch.Tensor], Moments]

# Weights solved at once on an accelerator: a dozen fp32 copies of them take 3 GB.
BATCH_WEIGHTS = 1 << 26
# Added to the two dampings for each column per token: moments of few tokens, as experts have them, say little
# of other text. Chosen on a few layers of one small model, by the output error on tokens not heard.
SCARCE_DAMPING = 0.5
SCARCE_CORRECTION_DAMPING = 2.0


def batches(groups: Sequence[Heard]) -> list[list[int]]:
    """Indices of groups that can be solved at once: same shapes, same device; one by one on the CPU."""
    alike: dict[object, list[int]] = defaultdict(list)
    for index, (weights_OI, moments) in enumerate(groups):
        shapes = tuple((w.shape, w.dtype, w.device) for w in weights_OI)
        alone = index if weights_OI[0].device.type == "cpu" else None
        alike[shapes, moments.cross_II is None, alone].append(index)
    found = []
    for indices in alike.values():
        weights = sum(w.numel() for w in groups[indices[0]][0])
        step = max(BATCH_WEIGHTS // weights, 1)
        found += [indices[start : start + step] for start in range(0, len(indices), step)]
    return found


def solve_batch(
    options: Gptq, groups: Sequence[Heard], scheme: Scheme, importance_I: torch.Tensor | None = None
) -> list[list[Solved]]:
    """The solved matrices of each group; all groups have matrices of the same shapes.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    solved = [Rtn().solve(weights_OI, scheme, importance_I) for weights_OI, _ in groups]
    usable = []
    for b, (_, moments) in enumerate(groups):
        fault = _fault(moments)
        solved[b] = [replace(each, note=fault) for each in solved[b]]
        if fault is None:
            usable.append(b)
    if usable:
        rounding = _Rounding([groups[b] for b in usable], scheme, options)
        rounding.run()
        for i, b in enumerate(usable):
            solved[b] = rounding.results(i, solved[b])
    return solved


def _fault(moments: Moments) -> str | None:
    """Why nothing can be learned from the moments, or None."""
    if moments.rows == 0:
        return "no token of the calibration text reached it"
    sums = [moments.second_II] if moments.cross_II is None else [moments.second_II, moments.cross_II]
    if not all(bool(x.isfinite().all()) for x in sums):
        return "its inputs on the calibration text are not finite"
    if not bool((moments.second_II.diagonal() > 0).any()):
        return "its inputs on the calibration text are all zero"
    return None


class _Rounding:
    """A batch on its way from weights to lattice values, in units that bring each group's weights near 1."""

    def __init__(self, groups: Sequence[Heard], scheme: Scheme, options: Gptq) -> None:
        self._scheme, self._options = scheme, options
        self._weights = [[w.float() for w in weights_OI] for weights_OI, _ in groups]
        self._dtypes = [w.dtype for w in groups[0][0]]
        self._rows = _slices([len(w) for w in groups[0][0]])
        self._units = [_unit(weights_OI) for weights_OI in self._weights]
        stacked = [torch.cat(w) * unit for w, unit in zip(self._weights, self._units, strict=True)]
        self._goal = Goal.of(torch.stack(stacked), [moments for _, moments in groups])
        # columns per token: how far sampling alone may bend H
        scarcity_B = torch.tensor([moments.second_II.shape[0] / moments.rows for _, moments in groups])
        damping_B = options.damping + SCARCE_DAMPING * scarcity_B
        self._damped = Damped.of(self._goal.h_BII, damping_B, ordered=options.activation_order)
        self._target_BOI = self._goal.weight_BOI
        if self._goal.pull_BOI is not None:
            damping_B = options.correction_damping + SCARCE_CORRECTION_DAMPING * scarcity_B
            held = Damped.of(self._goal.h_BII, damping_B, ordered=False)
            self._target_BOI = self._target_BOI + held.divide(self._goal.pull_BOI)
        self._scales = [self._fit(b) for b in range(len(groups))]
        self._chosen_BOI = torch.empty(0)

    def run(self) -> None:
        """Chooses the values."""
        self._sweep()
        if self._options.passes == 0:
            return
        in_features = self._target_BOI.shape[2]
        if len(self._scheme.near(self._scales[0][0], in_features)) == 1:
            self._descend(self._options.passes)
            return
        for _ in range(self._options.passes):
            self._refit()

    def _fit(self, b: int) -> list[Scales]:
        """Scales of a group's matrices for the target: what is left of each column's error is what counts."""
        importance_I = self._damped.pivots_BI[b]
        parts = [self._target_BOI[b, rows] / self._units[b] for rows in self._rows]
        limits = [torch.finfo(dtype).max for dtype in self._dtypes]
        narrow = [
            part.clamp(-limit, limit).to(dtype)
            for part, limit, dtype in zip(parts, limits, self._dtypes, strict=True)
        ]
        return self._scheme.fit(narrow, search="full", importance_I=importance_I)

    def _lattice(self, scales: list[list[Scales]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points [B, O, C] in the groups' units, of the scales of each group's matrices."""
        lattices = []
        for group, weights, unit in zip(scales, self._weights, self._units, strict=True):
            parts = [self._scheme.lattice(s, *w.shape) for s, w in zip(group, weights, strict=True)]
            lattices.append(concatenate(parts).scaled(unit))
        self._grid = lattices[0].grid
        return (
            torch.stack([lattice.scale_OC for lattice in lattices]),
            torch.stack([lattice.zero_OC for lattice in lattices]),
        )

    def _sweep(self) -> None:
        order_BI = self._damped.order_BI
        scale_BOC, zero_BOC = self._lattice(self._scales)
        width = order_BI.shape[1] // scale_BOC.shape[2]
        chosen_BOI = sweep(
            reorder(self._target_BOI, order_BI),
            None,
            feedback(self._damped.m_BII),
            scale_BOC,
            zero_BOC,
            order_BI // width,
            self._grid,
        )
        self._chosen_BOI = restore(chosen_BOI, order_BI)

    def _refit(self) -> None:
        """Each scale group's scale and codes again, given all other groups."""
        in_features = self._target_BOI.shape[2]
        near = [[self._scheme.near(s, in_features) for s in group] for group in self._scales]
        tables = [self._lattice([[n[k] for n in group] for group in near]) for k in range(len(near[0][0]))]
        scale_BOCK = torch.stack([scale for scale, _ in tables], dim=-1)
        zero_BOCK = torch.stack([zero for _, zero in tables], dim=-1)
        inverse_BCWW, a_BCWW, d_BCW = self._blocks(scale_BOCK.shape[2])
        self._chosen_BOI, best_BOC = refit(
            self._target_BOI,
            self._chosen_BOI,
            self._damped.h_BII,
            inverse_BCWW,
            a_BCWW,
            d_BCW,
            scale_BOCK,
            zero_BOCK,
            self._grid,
        )
        self._scales = [
            [_pick(near[b][i], best_BOC[b, rows]) for i, rows in enumerate(self._rows)]
            for b in range(len(near))
        ]

    def _blocks(self, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inverse, feedback and pivots of the diagonal block of H + d of each scale group."""
        h_BII = self._damped.h_BII
        batch, in_features, _ = h_BII.shape
        width = in_features // groups
        blocks_BCWW = h_BII.view(batch, groups, width, groups, width).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        blocks_NWW = blocks_BCWW.reshape(-1, width, width)
        m_NWW, _ = factor(blocks_NWW)
        inverse_NWW = divide(torch.eye(width, device=h_BII.device).expand_as(blocks_NWW), m_NWW)
        d_NW = m_NWW.diagonal(dim1=1, dim2=2).square()
        shape = (batch, groups, width, width)
        return inverse_NWW.view(shape), feedback(m_NWW).view(shape), d_NW.view(shape[:3])

    def _descend(self, times: int) -> None:
        """Cyclic coordinate descent: each code given all others, which never adds to the error."""
        h_BII = self._damped.h_BII
        a_BII = h_BII / h_BII.diagonal(dim1=1, dim2=2)[..., None]
        a_BII.diagonal(dim1=1, dim2=2).zero_()
        scale_BOC, zero_BOC = self._lattice(self._scales)
        width = h_BII.shape[1] // scale_BOC.shape[2]
        group_BI = (torch.arange(h_BII.shape[1], device=h_BII.device) // width).expand(h_BII.shape[:2])
        for _ in range(times):
            self._chosen_BOI = sweep(
                self._target_BOI, self._chosen_BOI, a_BII, scale_BOC, zero_BOC, group_BI, self._grid
            )

    def results(self, b: int, plain: list[Solved]) -> list[Solved]:
        """The matrices of a group, each as ``plain`` has it where that errs no more.

        Matrices that share a tensor-level scale are all taken from one of both.
        """
        if not bool(self._damped.ok_B[b]):
            return [replace(each, note="the moments of its inputs are singular") for each in plain]
        ours = [self._encode(b, i) for i in range(len(plain))]
        errors = [self._added_error(b, i, solved) for i, solved in enumerate(ours)]
        plain_errors = [self._added_error(b, i, solved) for i, solved in enumerate(plain)]
        better = [error < other for error, other in zip(errors, plain_errors, strict=True)]
        if self._scheme.shares_tensor_scale:
            better = [sum(errors) < sum(plain_errors)] * len(plain)
        solved = []
        for i, won in enumerate(better):
            chosen = ours[i] if won else replace(plain[i], note="round-to-nearest errs no more")
            error = errors[i] if won else plain_errors[i]
            solved.append(replace(chosen, output_error=error, rtn_output_error=plain_errors[i]))
        return solved

    def _encode(self, b: int, i: int) -> Solved:
        weight_OI = self._weights[b][i]
        chosen_OI = self._chosen_BOI[b, self._rows[i]] / self._units[b]
        tensors = self._scheme.encode(chosen_OI, self._scales[b][i])
        decoded_OI = self._scheme.decode(tensors, *weight_OI.shape)
        return Solved(tensors, *squares(weight_OI, decoded_OI), used="gptq")

    def _added_error(self, b: int, i: int, solved: Solved) -> float:
        decoded_OI = self._scheme.decode(solved.tensors, *self._weights[b][i].shape) * self._units[b]
        part = b, self._rows[i]
        least = self._goal.added_error(part, self._target_BOI[part])
        return self._goal.added_error(part, decoded_OI) - least


def _slices(lengths: Sequence[int]) -> list[slice]:
    """Consecutive slices of these lengths."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _unit(weights_OI: Sequence[torch.Tensor]) -> float:
    """A power of two that brings the largest value near 1, so that squares neither overflow nor vanish."""
    largest = max(float(w.abs().max()) for w in weights_OI)
    return 2.0 ** max(min(-frexp(largest)[1], 126), -126) if largest > 0 else 1.0


def _pick(near: list[Scales], best_OC: torch.Tensor) -> Scales:
    """Of each scale group the candidate that ``best_OC`` names."""
    index = best_OC[None]
    scale_OC = torch.stack([s.scale for s in near]).gather(0, index)[0]
    zeros = [s.zero_point for s in near if s.zero_point is not None]
    zero_OC = torch.stack(zeros).gather(0, index)[0] if zeros else None
    return Scales(scale_OC, zero_OC, near[0].global_scale)
