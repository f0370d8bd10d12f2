"""Rounding to a lattice under a quadratic error, column by column; ``compressor.kernels`` has the twins.

The error of a row is e H e^T with e = chosen - target. With H = M M^T, M upper triangular, it is the sum over
columns j of (M[j,j] (e[j] + sum over k < j of A[j,k] e[k]))^2, A[j,k] = M[k,j] / M[j,j]: taking the nearest
value to target[j] - sum of A[j,k] e[k] in column after column is GPTQ (arXiv:2210.17323, algorithm 1; that
its update by the inverse is this feedback is theorem 6 of QuIP, arXiv:2307.13304). With A[j,k] = H[j,k] /
H[j,j] over all k but j the same step is cyclic coordinate descent.

fp32. Every function takes a batch of matrices, each with its own H.

Legend: B matrices of O rows and I columns, C groups in a row, W columns of a group, K candidate scales.
"""

from __future__ import annotations

import torch

from compressor.numerics.grids import Grid

BLOCK = 64


def sweep(
    target_BOI: torch.Tensor,
    chosen_BOI: torch.Tensor | None,
    a_BII: torch.Tensor,
    scale_BOC: torch.Tensor,
    zero_BOC: torch.Tensor,
    group_BI: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """fp32 [B, O, I]: the lattice values, each column in turn nearest to ``target - sum of A e``.

    Args:
        target_BOI: what to round.
        chosen_BOI: what a sweep before this one gave, or None for the first: then e is zero where no value
            is chosen yet, and ``a_BII`` is strictly lower triangular.
        a_BII: the feedback; its diagonal is zero.
        scale_BOC: scale of each group.
        zero_BOC: zero point of each group.
        group_BI: int64, the group of each column.
        grid: the format's.
    """
    columns = target_BOI.shape[2]
    chosen = torch.zeros_like(target_BOI) if chosen_BOI is None else chosen_BOI.clone()
    error_BOI = torch.zeros_like(target_BOI) if chosen_BOI is None else chosen_BOI - target_BOI
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        a_BJI = a_BII[:, block]
        own_BOJ = error_BOI[..., block]
        reach = block.start if chosen_BOI is None else columns
        wanted_BOJ = target_BOI[..., block] - error_BOI[..., :reach] @ a_BJI[..., :reach].mT
        a_BJJ = a_BJI[..., block]
        if chosen_BOI is not None:  # the block's own errors change below: they are counted there
            wanted_BOJ = wanted_BOJ + own_BOJ @ a_BJJ.mT
        index_BOJ = group_BI[:, None, block].expand(wanted_BOJ.shape)
        scale_BOJ, zero_BOJ = scale_BOC.gather(2, index_BOJ), zero_BOC.gather(2, index_BOJ)
        for j in range(block.stop - start):
            v_BO = wanted_BOJ[..., j] - (own_BOJ @ a_BJJ[:, j, :, None])[..., 0]
            scale_BO, zero_BO = scale_BOJ[..., j], zero_BOJ[..., j]
            value_BO = (grid.round(v_BO / scale_BO + zero_BO) - zero_BO) * scale_BO
            chosen[..., start + j] = value_BO
            own_BOJ[..., j] = value_BO - target_BOI[..., start + j]
    return chosen


def refit(
    target_BOI: torch.Tensor,
    chosen_BOI: torch.Tensor,
    h_BII: torch.Tensor,
    inverse_BCWW: torch.Tensor,
    a_BCWW: torch.Tensor,
    d_BCW: torch.Tensor,
    scale_BOCK: torch.Tensor,
    zero_BOCK: torch.Tensor,
    grid: Grid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group by group, the best scale and values given the other groups: values [B, O, I], choice [B, O, C].

    Each candidate scale rounds the group's columns in turn as ``sweep`` does, towards the group's best real
    values given all others; the group becomes the one that errs least, if less than what it holds now. So
    the error never grows.

    Args:
        target_BOI: what to round.
        chosen_BOI: lattice values under the scales of candidate 0.
        h_BII: H.
        inverse_BCWW: inverse of each group's diagonal block of H.
        a_BCWW: each block's feedback, strictly lower triangular.
        d_BCW: each block's squared pivots M[j,j]^2.
        scale_BOCK: candidate scales.
        zero_BOCK: their zero points.
        grid: the format's.
    """
    chosen_BOI = chosen_BOI.clone()
    error_BOI = chosen_BOI - target_BOI
    groups, width = d_BCW.shape[1:]
    best_BOC = torch.zeros(scale_BOCK.shape[:-1], dtype=torch.int64, device=target_BOI.device)
    for c in range(groups):
        own = slice(c * width, (c + 1) * width)
        pull_BOW = error_BOI @ h_BII[:, own].mT - error_BOI[..., own] @ h_BII[:, own, own].mT
        centre_BOW = target_BOI[..., own] - pull_BOW @ inverse_BCWW[:, c].mT
        now_BOW = chosen_BOI[..., own]
        a_BWW, d_BW = a_BCWW[:, c], d_BCW[:, c]
        miss_BOW = now_BOW - centre_BOW
        least_BO = ((miss_BOW + miss_BOW @ a_BWW.mT) ** 2 * d_BW[:, None]).sum(-1)
        trial_KBOW, cost_KBO = _trials(centre_BOW, a_BWW, d_BW, scale_BOCK[:, :, c], zero_BOCK[:, :, c], grid)
        cost_BO, index_BO = cost_KBO.min(dim=0)
        better_BO = cost_BO < least_BO
        pick = index_BO[None, ..., None].expand(1, *now_BOW.shape)
        chosen_BOI[..., own] = torch.where(better_BO[..., None], trial_KBOW.gather(0, pick)[0], now_BOW)
        best_BOC[..., c] = torch.where(better_BO, index_BO, 0)
        error_BOI[..., own] = chosen_BOI[..., own] - target_BOI[..., own]
    return chosen_BOI, best_BOC


def _trials(
    centre_BOW: torch.Tensor,
    a_BWW: torch.Tensor,
    d_BW: torch.Tensor,
    scale_BOK: torch.Tensor,
    zero_BOK: torch.Tensor,
    grid: Grid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [K, B, O, W] and errors [K, B, O] of one group for each candidate."""
    scale_KBO, zero_KBO = scale_BOK.movedim(-1, 0), zero_BOK.movedim(-1, 0)
    trial_KBOW = centre_BOW.expand(len(scale_KBO), *centre_BOW.shape).clone()
    error_KBOW = torch.zeros_like(trial_KBOW)
    cost_KBO = torch.zeros_like(scale_KBO)
    for j in range(centre_BOW.shape[-1]):
        v_KBO = centre_BOW[..., j] - (error_KBOW @ a_BWW[:, j, :, None])[..., 0]
        value_KBO = (grid.round(v_KBO / scale_KBO + zero_KBO) - zero_KBO) * scale_KBO
        trial_KBOW[..., j] = value_KBO
        error_KBOW[..., j] = value_KBO - centre_BOW[..., j]
        cost_KBO += d_BW[:, None, j] * (value_KBO - v_KBO) ** 2
    return trial_KBOW, cost_KBO
