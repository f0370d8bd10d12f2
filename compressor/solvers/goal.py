"""The error that calibrated rounding minimises. Imported only where arithmetic is done.

With x the source model's inputs and xhat those that the quantized model feeds, over all tokens:

    J(What) = sum ||W x - What xhat||^2 = tr(What H What^T) - 2 tr(W (H + D) What^T) + const,

H = sum xhat xhat^T, D = sum (x - xhat) xhat^T (0 where only one stream was heard). Kept near W by a ridge c,
its least argument over all real matrices is

    W* = W + W D (H + c)^-1,

and that is what What is rounded from, under the quadratic error (What - W*) (H + d) (What - W*)^T. Both
ridges make H invertible; c is the larger: what D says of the errors so far holds for the text that was heard.

Since J's gradient at W* is -2 c (W* - W), what rounding adds is, with E = What - W*,

    J(What) - J(W*) = tr(E H E^T) - 2 c tr(E (W* - W)^T).

Legend: B problems of O rows and I columns each, C groups in a row, W columns of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compressor.solvers.measure import inner
from compressor.solvers.statistics import Moments, mirror

# Damping as fractions of H's mean diagonal: what was asked for, and what is tried where H is not positive.
LADDER = (1.0, 10.0, 100.0)
# Columns factored at once, in fp64; the rest of a larger matrix stays in fp32.
FACTORED = 1024
# Rows copied at once into another order of columns, and rows divided or multiplied by a matrix at once.
COPIED = 1024
DIVIDED = 2048


@dataclass(frozen=True)
class Goal:
    """J of a batch of matrices.

    Attributes:
        weight_BOI: fp32.
        h_BII: H, fp32; of a single problem the moments' own memory, whose lower half is made from its upper.
        mean_B: H's mean diagonal, fp64.
        target_BOI: W*; of a problem whose H cannot be factored, W. W itself, not a copy, where D = 0.
        ridge_B: c, fp64; 0 where W* is W.
    """

    weight_BOI: torch.Tensor
    h_BII: torch.Tensor
    mean_B: torch.Tensor
    target_BOI: torch.Tensor
    ridge_B: torch.Tensor

    @classmethod
    def of(
        cls,
        weight_BOI: torch.Tensor,
        moments: Sequence[Moments],
        damping_B: torch.Tensor,
        units: Sequence[float] | None = None,
    ) -> Goal:
        """The goal for moments with finite, not all zero sums; D counts if all have it in one form.

        ``damping_B``: c as a fraction of H's mean diagonal. ``units``: what the weights were multiplied by.
        Extra memory: W*, but for a single problem's ``pull_OI``, whose memory it takes; and panels.
        """
        h_BII = _stacked([m.second_II for m in moments])
        mean_B = h_BII.diagonal(dim1=1, dim2=2).double().mean(dim=1)
        target_BOI = _pull(weight_BOI, moments, units or [1.0] * len(moments))
        if target_BOI is None:
            return cls(weight_BOI, h_BII, mean_B, weight_BOI, torch.zeros_like(mean_B))
        added_B, ok_B = divide_damped(target_BOI, h_BII, damping_B.to(mean_B) * mean_B)
        target_BOI[~ok_B] = 0.0
        ridge_B = torch.where(ok_B, added_B, 0.0)
        return cls(weight_BOI, h_BII, mean_B, target_BOI.add_(weight_BOI), ridge_B)

    def energy(self, part: tuple[int, slice]) -> float:
        """Sum of ||W xhat||^2 for some rows of one problem."""
        b, rows = part
        weights = torch.split(self.weight_BOI[b, rows], DIVIDED)
        return sum(inner(weight_OI, weight_OI @ self.h_BII[b]) for weight_OI in weights)

    def added_error(self, part: tuple[int, slice], decoded_OI: torch.Tensor) -> float:
        """J(decoded) - J(W*) for some rows of one problem."""
        b, rows = part
        ridge = float(self.ridge_B[b])
        added = 0.0
        for decoded, target, weight in zip(
            torch.split(decoded_OI, DIVIDED),
            torch.split(self.target_BOI[b, rows], DIVIDED),
            torch.split(self.weight_BOI[b, rows], DIVIDED),
            strict=True,
        ):
            error_OI = decoded - target
            added += inner(error_OI, error_OI @ self.h_BII[b])
            if ridge > 0.0:
                added -= 2.0 * ridge * inner(error_OI, target - weight)
        return added


@dataclass(frozen=True)
class Root:
    """R, lower triangular, with R^T R = H + d, its columns in the order of the sweep.

    Attributes:
        root_BII: R, fp32.
        order_BI: int64, the column that is rounded first, second... None where that is their own order.
        added_B: d, fp64.
        ok_B: whether the factorisation succeeded; else R is the identity, and what it makes is not used.
    """

    root_BII: torch.Tensor
    order_BI: torch.Tensor | None
    added_B: torch.Tensor
    ok_B: torch.Tensor

    @classmethod
    def of(cls, h_BII: torch.Tensor, damping_B: torch.Tensor, *, ordered: bool) -> Root:
        """Damped by ``damping_B``, 10 times it or 100 times it, the least that makes H positive definite.

        ``ordered``: columns with large diagonals first, so that their errors can still be made up for.
        Extra memory: R, and a few panels of ``FACTORED`` columns in fp64.
        """
        order_BI = None
        if ordered:
            order_BI = h_BII.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        root_BII, added_B = torch.empty_like(h_BII), torch.zeros_like(damping_B)
        ok_B = torch.zeros(len(h_BII), dtype=torch.bool, device=h_BII.device)
        todo = list(range(len(h_BII)))
        for step in LADDER:
            tried_BII = root_BII if len(todo) == len(h_BII) else torch.empty_like(h_BII[todo])
            for tried_II, b in zip(tried_BII, todo, strict=True):
                _reorder_both(h_BII[b], None if order_BI is None else order_BI[b], tried_II)
                tried_II.diagonal().add_((damping_B[b] * step).float())
            added_B[todo], ok_B[todo] = damping_B[todo] * step, factor(tried_BII)
            if tried_BII is not root_BII:
                root_BII[todo] = tried_BII
            todo = [b for b, ok in enumerate(ok_B.tolist()) if not ok]
            if not todo:
                break
        for b in todo:
            root_BII[b] = torch.eye(h_BII.shape[1], device=h_BII.device)
        return cls(root_BII, order_BI, added_B, ok_B)

    @property
    def pivots_BI(self) -> torch.Tensor:
        """fp32, in the columns' own order: what an error costs once all later columns made up for it."""
        pivot_BI = self.root_BII.diagonal(dim1=1, dim2=2).square()
        if self.order_BI is None:
            return pivot_BI
        return torch.empty_like(pivot_BI).scatter_(1, self.order_BI, pivot_BI)


def _pull(
    weight_BOI: torch.Tensor, moments: Sequence[Moments], units: Sequence[float]
) -> torch.Tensor | None:
    """W D in the weights' units; None where it is not known of all."""
    pulls = [m.pull_OI for m in moments if m.pull_OI is not None]
    if len(pulls) == len(moments):
        pull_BOI = _stacked(pulls)
        for pull_OI, unit in zip(pull_BOI, units, strict=True):
            pull_OI.mul_(unit)
        return pull_BOI
    changes = [m.change_II for m in moments if m.change_II is not None]
    return weight_BOI @ _stacked(changes) if len(changes) == len(moments) else None


def divide_damped(
    b_BOI: torch.Tensor, h_BII: torch.Tensor, damping_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """b becomes b (H + d)^-1; d [B] of ``LADDER``'s and whether there is one [B], else b is as it was.

    The root is made in H's lower half and needs no memory of its own; H is then as it was.
    """
    added_B, ok_B = torch.zeros_like(damping_B), torch.zeros_like(damping_B, dtype=torch.bool)
    for b, h_1II in enumerate(torch.split(h_BII, 1)):
        diagonal_1I = h_1II.diagonal(dim1=1, dim2=2)
        before_1I = diagonal_1I.clone()
        for step in LADDER:
            diagonal_1I.copy_(before_1I + (damping_B[b] * step).float())
            mirror(h_1II[0])
            added_B[b], ok_B[b] = damping_B[b] * step, factor(h_1II, keep_upper=True)[0]
            if bool(ok_B[b]):
                for rows_1OI in torch.split(b_BOI[b : b + 1], DIVIDED, dim=1):
                    rows_1OI.copy_(divide(rows_1OI, h_1II))
                break
        diagonal_1I.copy_(before_1I)
        mirror(h_1II[0])
    return added_B, ok_B


def _stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, I, I]; a single matrix is not copied."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))


def _reorder_both(h_II: torch.Tensor, order_I: torch.Tensor | None, out_II: torch.Tensor) -> None:
    """``out_II`` becomes ``h_II`` with rows and columns in the order given."""
    if order_I is None:
        out_II.copy_(h_II)
        return
    for start in range(0, len(h_II), COPIED):
        chosen = order_I[start : start + COPIED]
        torch.index_select(h_II[chosen], 1, order_I, out=out_II[start : start + COPIED])


def reorder(x_BOI: torch.Tensor, order_BI: torch.Tensor | None) -> torch.Tensor:
    """Columns in the order given; None is their own, and then nothing is copied."""
    return x_BOI if order_BI is None else x_BOI.gather(2, order_BI[:, None].expand(x_BOI.shape))


def restore(x_BOI: torch.Tensor, order_BI: torch.Tensor | None) -> torch.Tensor:
    """The inverse of ``reorder``."""
    if order_BI is None:
        return x_BOI
    return torch.empty_like(x_BOI).scatter_(2, order_BI[:, None].expand(x_BOI.shape), x_BOI)


def feedback(root_BII: torch.Tensor) -> torch.Tensor:
    """fp32 strictly lower triangular A[j, k] = R[j, k] / R[j, j], in R's memory: see ``numerics.columns``."""
    diagonal_BI = root_BII.diagonal(dim1=1, dim2=2)
    root_BII.div_(diagonal_BI.clone()[..., None])
    diagonal_BI.zero_()
    return root_BII


def factor(h_BII: torch.Tensor, *, keep_upper: bool = False) -> torch.Tensor:
    """H becomes R, lower triangular, with H = R^T R; bool [B]: whether there is one (else R is junk).

    Panels of rows, the last ones first; in fp64 but for what is stored.

    ``keep_upper``: what lies above the diagonal stays H's, instead of zeros.
    """
    size = h_BII.shape[1]
    ok_B = torch.ones(len(h_BII), dtype=torch.bool, device=h_BII.device)
    for start in reversed(range(0, size, FACTORED)):
        own = slice(start, min(start + FACTORED, size))
        panel_BJI = h_BII[:, own, : own.stop].double()
        for late in range(own.stop, size, FACTORED):
            done_BJI = h_BII[:, late : late + FACTORED, : own.stop].double()
            panel_BJI.baddbmm_(done_BJI[..., own].mT, done_BJI, alpha=-1.0)
        lower_BJJ, info_B = torch.linalg.cholesky_ex(panel_BJI[..., own].flip(1, 2))
        root_BJJ = lower_BJJ.mT.flip(1, 2)
        ok_B &= info_B == 0
        if start > 0:
            left_BJI = panel_BJI[..., :start]
            h_BII[:, own, :start] = torch.linalg.solve_triangular(root_BJJ.mT, left_BJI, upper=True)
        if keep_upper:
            h_BII[:, own, own] = root_BJJ.tril() + h_BII[:, own, own].triu(1)
        else:
            h_BII[:, own, own] = root_BJJ
            h_BII[:, own, own.stop :] = 0.0
    return ok_B


def divide(b_BOI: torch.Tensor, root_BII: torch.Tensor) -> torch.Tensor:
    """fp32 [B, O, I]: b (R^T R)^-1, by two substitutions; what lies above R's diagonal is not looked at."""
    y_BOI = torch.linalg.solve_triangular(root_BII, b_BOI, upper=False, left=False)
    x_BOI: torch.Tensor = torch.linalg.solve_triangular(root_BII.mT, y_BOI, upper=True, left=False)
    return x_BOI
