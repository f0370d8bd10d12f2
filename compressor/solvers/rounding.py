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
from compressor.solvers.goal import Goal, Root, divide, factor, feedback, reorder, restore
from compressor.solvers.measure import squares
from compressor.solvers.rtn import Rtn
from compressor.solvers.statistics import Moments

if TYPE_CHECKING:
    from compressor.solvers.gptq import Gptq

Heard = tuple[Sequence[torch.Tensor], Moments]

# Weights solved at once on an accelerator: a dozen fp32 copies of them take 1.6 GB.
BATCH_WEIGHTS = 1 << 25
# Weights swept at once: rows do not depend on one another, and each sweep takes a few fp32 copies of them.
SWEPT_WEIGHTS = 1 << 25
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
        forms = (moments.change_II is None, moments.pull_OI is None)
        alike[shapes, forms, alone].append(index)
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
    sums = [moments.second_II] if moments.changes is None else [moments.second_II, moments.changes]
    # the mask of a sum takes a quarter of it: a minimum and a maximum, which NaN passes through, take nothing
    if not all(bool(torch.stack(x.aminmax()).isfinite().all()) for x in sums):
        return "its inputs on the calibration text are not finite"
    if not bool((moments.second_II.diagonal() > 0).any()):
        return "its inputs on the calibration text are all zero"
    return None


class _Rounding:
    """A batch on its way from weights to lattice values, in units that bring each group's weights near 1."""

    def __init__(self, groups: Sequence[Heard], scheme: Scheme, options: Gptq) -> None:
        self._scheme, self._options = scheme, options
        self._weights = [weights_OI for weights_OI, _ in groups]
        self._rows = _slices([len(w) for w in groups[0][0]])
        self._units = [_unit(weights_OI) for weights_OI in self._weights]
        # columns per token: how far sampling alone may bend H
        scarcity_B = torch.tensor([moments.second_II.shape[0] / moments.rows for _, moments in groups])
        ridge_B = options.correction_damping + SCARCE_CORRECTION_DAMPING * scarcity_B
        self._goal = Goal.of(self._stacked(), [moments for _, moments in groups], ridge_B, self._units)
        damping_B = (options.damping + SCARCE_DAMPING * scarcity_B).to(self._goal.mean_B)
        self._root = Root.of(
            self._goal.h_BII, damping_B * self._goal.mean_B, ordered=options.activation_order
        )
        self._scales = [self._fit(b) for b in range(len(groups))]
        self._chosen_BOI = torch.empty(0)

    def _stacked(self) -> torch.Tensor:
        """fp32 [B, O, I]: the matrices of each group one below the other, times the group's unit."""
        rows, columns = self._rows[-1].stop, self._weights[0][0].shape[1]
        stacked_BOI = torch.empty(len(self._weights), rows, columns, device=self._weights[0][0].device)
        for stacked_OI, weights, unit in zip(stacked_BOI, self._weights, self._units, strict=True):
            for part, weight_OI in zip(self._rows, weights, strict=True):
                stacked_OI[part] = weight_OI
            stacked_OI.mul_(unit)
        return stacked_BOI

    def run(self) -> None:
        """Chooses the values."""
        self._sweep()
        if self._options.passes == 0:
            return
        h_BII = self._goal.h_BII
        if len(self._scheme.near(self._scales[0][0], h_BII.shape[2])) == 1:
            self._descend(self._damped(h_BII.clone()), self._options.passes)
            return
        diagonal_BI = h_BII.diagonal(dim1=1, dim2=2)
        before_BI = diagonal_BI.clone()
        damped_BII = self._damped(h_BII if bool(self._root.ok_B.all()) else h_BII.clone())
        for _ in range(self._options.passes):
            self._refit(damped_BII)
        diagonal_BI.copy_(before_BI)

    def _swept(self) -> list[slice]:
        """Rows that are swept at once."""
        problems, rows, columns = self._goal.target_BOI.shape
        step = max(SWEPT_WEIGHTS // (problems * columns), 1)
        return [slice(start, start + step) for start in range(0, rows, step)]

    def _fit(self, b: int) -> list[Scales]:
        """Scales of a group's matrices for the target: what is left of each column's error is what counts."""
        importance_I = self._root.pivots_BI[b]
        parts = [self._goal.target_BOI[b, rows] / self._units[b] for rows in self._rows]
        for i, weight_OI in enumerate(self._weights[b]):
            limit = min(torch.finfo(weight_OI.dtype).max, torch.finfo(torch.float32).max)
            parts[i].clamp_(-limit, limit)
            if weight_OI.dtype == torch.float16:  # in which some formats then store their scales
                parts[i] = parts[i].half()
        return self._scheme.fit(parts, search="full", importance_I=importance_I)

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
        """The first choice; leaves nothing of the root but whether there is one."""
        scale_BOC, zero_BOC = self._lattice(self._scales)
        target_BOI, order_BI = self._goal.target_BOI, self._root.order_BI
        columns = target_BOI.shape[2]
        a_BII = feedback(self._root.root_BII)
        self._root = replace(self._root, root_BII=torch.empty(0))
        swept_BI = order_BI
        if swept_BI is None:
            swept_BI = torch.arange(columns, device=target_BOI.device).expand(len(target_BOI), columns)
        group_BI = swept_BI // (columns // scale_BOC.shape[2])
        self._chosen_BOI = torch.empty_like(target_BOI)
        for rows in self._swept():
            chosen_BOI = sweep(
                reorder(target_BOI[:, rows], order_BI),
                None,
                a_BII,
                scale_BOC[:, rows],
                zero_BOC[:, rows],
                group_BI,
                self._grid,
            )
            self._chosen_BOI[:, rows] = restore(chosen_BOI, order_BI)

    def _damped(self, h_BII: torch.Tensor) -> torch.Tensor:
        """H becomes H + d in the columns' own order; the identity where that could not be factored."""
        h_BII.diagonal(dim1=1, dim2=2).add_(self._root.added_B.float()[:, None])
        for h_II, ok in zip(h_BII, self._root.ok_B.tolist(), strict=True):
            if not ok:
                h_II.copy_(torch.eye(len(h_II), device=h_II.device))
        return h_BII

    def _refit(self, h_BII: torch.Tensor) -> None:
        """Each scale group's scale and codes again, given all other groups."""
        near = [[self._scheme.near(s, h_BII.shape[2]) for s in group] for group in self._scales]
        tables = [self._lattice([[n[k] for n in group] for group in near]) for k in range(len(near[0][0]))]
        scale_BOCK = torch.stack([scale for scale, _ in tables], dim=-1)
        zero_BOCK = torch.stack([zero for _, zero in tables], dim=-1)
        inverse_BCWW, a_BCWW, d_BCW = _blocks(h_BII, scale_BOCK.shape[2])
        best_BOC = torch.empty(scale_BOCK.shape[:3], dtype=torch.int64, device=h_BII.device)
        for rows in self._swept():
            self._chosen_BOI[:, rows], best_BOC[:, rows] = refit(
                self._goal.target_BOI[:, rows],
                self._chosen_BOI[:, rows],
                h_BII,
                inverse_BCWW,
                a_BCWW,
                d_BCW,
                scale_BOCK[:, rows],
                zero_BOCK[:, rows],
                self._grid,
            )
        self._scales = [
            [_pick(near[b][i], best_BOC[b, rows]) for i, rows in enumerate(self._rows)]
            for b in range(len(near))
        ]

    def _descend(self, h_BII: torch.Tensor, times: int) -> None:
        """Cyclic coordinate descent: each code given all others, which never adds to the error.

        Overwrites ``h_BII``.
        """
        diagonal_BI = h_BII.diagonal(dim1=1, dim2=2)
        h_BII.div_(diagonal_BI.clone()[..., None])
        diagonal_BI.zero_()
        scale_BOC, zero_BOC = self._lattice(self._scales)
        width = h_BII.shape[1] // scale_BOC.shape[2]
        group_BI = (torch.arange(h_BII.shape[1], device=h_BII.device) // width).expand(h_BII.shape[:2])
        for _ in range(times):
            self._chosen_BOI = sweep(
                self._goal.target_BOI, self._chosen_BOI, h_BII, scale_BOC, zero_BOC, group_BI, self._grid
            )

    def results(self, b: int, plain: list[Solved]) -> list[Solved]:
        """The matrices of a group, each as ``plain`` has it where that errs no more.

        Matrices that share a tensor-level scale are all taken from one of both.
        """
        if not bool(self._root.ok_B[b]):
            return [replace(each, note="the moments of its inputs are singular") for each in plain]
        energies = [self._goal.energy((b, rows)) for rows in self._rows]
        ours = [self._encode(b, i, energy) for i, energy in enumerate(energies)]
        rtn = [
            self._judged(b, i, each, energies[i], self._decoded(b, i, each)) for i, each in enumerate(plain)
        ]
        better = [_error(mine) < _error(other) for mine, other in zip(ours, rtn, strict=True)]
        if self._scheme.shares_tensor_scale:
            better = [sum(map(_error, ours)) < sum(map(_error, rtn))] * len(plain)
        return [
            replace(
                mine if won else replace(other, note="round-to-nearest errs no more"),
                rtn_output_error=other.output_error,
            )
            for mine, other, won in zip(ours, rtn, better, strict=True)
        ]

    def _encode(self, b: int, i: int, energy: float) -> Solved:
        chosen_OI = self._chosen_BOI[b, self._rows[i]] / self._units[b]
        tensors = self._scheme.encode(chosen_OI, self._scales[b][i])
        del chosen_OI
        solved = Solved(tensors, 0.0, 0.0, used="gptq")
        decoded_OI = self._decoded(b, i, solved)
        error, norm = squares(self._weights[b][i], decoded_OI)
        solved = replace(solved, squared_error=error, squared_norm=norm)
        return self._judged(b, i, solved, energy, decoded_OI)

    def _decoded(self, b: int, i: int, solved: Solved) -> torch.Tensor:
        return self._scheme.decode(solved.tensors, *self._weights[b][i].shape)

    def _judged(self, b: int, i: int, solved: Solved, energy: float, decoded_OI: torch.Tensor) -> Solved:
        """With what its values, which are overwritten, add to the error of the output."""
        added = self._goal.added_error((b, self._rows[i]), decoded_OI.mul_(self._units[b]))
        return replace(solved, output_error=added / energy if energy > 0.0 else 0.0)


def _error(solved: Solved) -> float:
    assert solved.output_error is not None
    return solved.output_error


def _blocks(h_BII: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse, feedback and pivots of the diagonal block of H + d of each scale group."""
    batch, in_features, _ = h_BII.shape
    width = in_features // groups
    blocks_BCWW = h_BII.view(batch, groups, width, groups, width).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    root_NWW = blocks_BCWW.flatten(0, 1).clone(memory_format=torch.contiguous_format)
    factor(root_NWW)
    inverse_NWW = divide(torch.eye(width, device=h_BII.device).expand_as(root_NWW), root_NWW)
    d_NW = root_NWW.diagonal(dim1=1, dim2=2).square()
    shape = (batch, groups, width, width)
    return inverse_NWW.view(shape), feedback(root_NWW).view(shape), d_NW.view(shape[:3])


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
