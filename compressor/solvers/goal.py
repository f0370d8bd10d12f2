"""The error that calibrated rounding minimises. Imported only where arithmetic is done.

With x the source model's inputs and xhat those that the quantized model feeds, over all tokens:

    J(What) = sum ||W x - What xhat||^2 = tr(What H What^T) - 2 tr(W C What^T) + const,

H = sum xhat xhat^T, C = sum x xhat^T (C = H where only one stream was heard). Kept near W by a ridge c, its
least argument over all real matrices is

    W* = W + W (C - H) (H + c)^-1,

and that is what What is rounded from, under the quadratic error (What - W*) (H + d) (What - W*)^T. Both
ridges make H invertible; c is the larger: what C says of the errors so far holds for the text that was heard.

Legend: B problems of O rows and I columns each, C groups in a row, W columns of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compressor.solvers.measure import inner
from compressor.solvers.statistics import Moments

# Damping as fractions of H's mean diagonal: what was asked for, and what is tried where H is not positive.
LADDER = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Goal:
    """J of a batch of matrices.

    Attributes:
        weight_BOI: fp32.
        h_BII: H over its mean diagonal, fp32.
        pull_BOI: W (C - H), in the same unit; None where C = H.
        output_BOI: W H: what its product with W sums to is the energy of the matrix's output.
    """

    weight_BOI: torch.Tensor
    h_BII: torch.Tensor
    pull_BOI: torch.Tensor | None
    output_BOI: torch.Tensor

    @classmethod
    def of(cls, weight_BOI: torch.Tensor, moments: Sequence[Moments]) -> Goal:
        """The goal for moments with finite, not all zero sums; cross moments count if all have them."""
        unit_B11 = torch.stack([m.second_II.diagonal().double().mean() for m in moments])[:, None, None]
        h_BII = torch.stack([m.second_II for m in moments]).div_(unit_B11.float())
        output_BOI = weight_BOI @ h_BII
        crosses = [m.cross_II for m in moments if m.cross_II is not None]
        if len(crosses) < len(moments):
            return cls(weight_BOI, h_BII, None, output_BOI)
        change_BII = torch.stack(crosses).div_(unit_B11.float()).sub_(h_BII)
        return cls(weight_BOI, h_BII, weight_BOI @ change_BII, output_BOI)

    def added_error(self, part: tuple[int, slice], decoded_OI: torch.Tensor) -> float:
        """(J(decoded) - J(W)) / sum ||W xhat||^2 for some rows of one problem."""
        b, rows = part
        weight_OI, h_1II = self.weight_BOI[b, rows], self.h_BII[b : b + 1]
        miss_OI = decoded_OI - weight_OI
        error = inner(miss_OI, (miss_OI[None] @ h_1II)[0])
        if self.pull_BOI is not None:
            error -= 2.0 * inner(self.pull_BOI[b, rows], miss_OI)
        energy = inner(weight_OI, self.output_BOI[b, rows])
        return error / energy if energy > 0.0 else 0.0


@dataclass(frozen=True)
class Damped:
    """H + d with its columns in the order of the sweep, factored as M M^T, M upper triangular.

    Attributes:
        h_BII: H + d, columns in their own order.
        order_BI: int64, the column that is rounded first, second...
        m_BII: M of the ordered columns.
        ok_B: whether the factorisation succeeded.
    """

    h_BII: torch.Tensor
    order_BI: torch.Tensor
    m_BII: torch.Tensor
    ok_B: torch.Tensor

    @classmethod
    def of(cls, h_BII: torch.Tensor, damping_B: torch.Tensor, *, ordered: bool) -> Damped:
        """Damped by ``damping_B``, 10 times it or 100 times it, the least that makes H positive definite.

        ``ordered``: columns with large diagonals first, so that their errors can still be made up for.
        """
        diagonal_BI = h_BII.diagonal(dim1=1, dim2=2)
        order_BI = torch.arange(h_BII.shape[1], device=h_BII.device).expand(diagonal_BI.shape)
        if ordered:
            order_BI = diagonal_BI.argsort(dim=1, descending=True, stable=True)
        damped_BII, m_BII = h_BII.clone(), torch.empty_like(h_BII)
        ok_B = torch.zeros(len(h_BII), dtype=torch.bool, device=h_BII.device)
        damping_B = damping_B.to(h_BII.device)
        for step in LADDER:
            todo_B = (~ok_B).nonzero()[:, 0]
            if len(todo_B) == 0:
                break
            tried_BII = h_BII[todo_B]
            tried_BII.diagonal(dim1=1, dim2=2).add_(damping_B[todo_B, None] * step)
            damped_BII[todo_B] = tried_BII
            m_BII[todo_B], ok_B[todo_B] = factor(
                reorder(reorder(tried_BII, order_BI[todo_B]).mT, order_BI[todo_B])
            )
        # what could not be factored becomes the identity: its result is not used
        eye_II = torch.eye(h_BII.shape[1], device=h_BII.device)
        damped_BII[~ok_B], m_BII[~ok_B] = eye_II, eye_II
        return cls(damped_BII, order_BI, m_BII, ok_B)

    @property
    def pivots_BI(self) -> torch.Tensor:
        """fp32, in the columns' own order: what an error costs once all later columns made up for it."""
        pivot_BI = self.m_BII.diagonal(dim1=1, dim2=2).square()
        return torch.empty_like(pivot_BI).scatter_(1, self.order_BI, pivot_BI)

    def divide(self, b_BOI: torch.Tensor) -> torch.Tensor:
        """fp32 [B, O, I]: b (H + d)^-1."""
        x_BOI = divide(reorder(b_BOI, self.order_BI), self.m_BII)
        return restore(x_BOI, self.order_BI)


def reorder(x_BOI: torch.Tensor, order_BI: torch.Tensor) -> torch.Tensor:
    """Columns in the order given."""
    return x_BOI.gather(2, order_BI[:, None].expand(x_BOI.shape))


def restore(x_BOI: torch.Tensor, order_BI: torch.Tensor) -> torch.Tensor:
    """The inverse of ``reorder``."""
    return torch.empty_like(x_BOI).scatter_(2, order_BI[:, None].expand(x_BOI.shape), x_BOI)


def feedback(m_BII: torch.Tensor) -> torch.Tensor:
    """fp32 strictly lower triangular A[j, k] = M[k, j] / M[j, j]: see ``numerics.columns``."""
    scaled_BII = m_BII / m_BII.diagonal(dim1=1, dim2=2)[:, None]
    return scaled_BII.mT.tril(-1).contiguous()


def factor(h_BII: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 upper triangular M with H = M M^T, and bool [B]: whether there is one (else M is junk).

    The factorisation runs in fp64.
    """
    lower_BII, info_B = torch.linalg.cholesky_ex(h_BII.double().flip(1, 2))
    return lower_BII.float().flip(1, 2), info_B == 0


def divide(b_BOI: torch.Tensor, m_BII: torch.Tensor) -> torch.Tensor:
    """fp32 [B, O, I]: b (M M^T)^-1, by two substitutions."""
    y_BOI = torch.linalg.solve_triangular(m_BII.mT, b_BOI, upper=False, left=False)
    x_BOI: torch.Tensor = torch.linalg.solve_triangular(m_BII, y_BOI, upper=True, left=False)
    return x_BOI
