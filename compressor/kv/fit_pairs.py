"""Scales of rotary pairs under which rotated keys are stored with the least error of logits.

A factor on both coordinates of a rotary pair passes through the rotation, so keys may be multiplied by it and
queries divided without any change of the logits, and both factors can be folded into weights. A codec that
rotates the whole head (TurboQuant, int4) spreads its error evenly over the coordinates of what it stores.

Legend: H KV heads, D head_dim, P = D / 2 rotary pairs.
"""

from __future__ import annotations

import torch

# Beyond this ratio to the head's mean, gains are small and 16-bit weights lose range.
_MOST = 16.0


def pair_scales(query_HDD: torch.Tensor, key_HDD: torch.Tensor) -> torch.Tensor:
    """fp64 [H, P]: what to multiply keys by, and divide queries by; of geometric mean 1 in each head.

    With error spread evenly over the stored keys' coordinates, the error of the logits is proportional to
    ``(sum_p Q_p / s_p^2) (sum_p K_p s_p^2)``, which ``s_p^4 = Q_p / K_p`` makes least (Cauchy-Schwarz).

    Args:
        query_HDD: second moments of the queries that read each KV head, after rotary positions.
        key_HDD: second moments of the keys, after rotary positions. Pair p is coordinates p and p + D / 2, as
            in transformers' ``rotate_half``; all of head_dim is rotated.
    """
    head_dim = query_HDD.shape[-1]
    assert query_HDD.shape == key_HDD.shape
    assert head_dim % 2 == 0
    query_HP, key_HP = (
        moments.double().diagonal(dim1=-2, dim2=-1).reshape(-1, 2, head_dim // 2).sum(-2)
        for moments in (query_HDD, key_HDD)
    )
    # A pair that is never used, or always zero, has no say.
    query_least, key_least = (x.amax(-1, keepdim=True).clamp_min(1e-300) * 1e-12 for x in (query_HP, key_HP))
    log_HP = (query_HP.clamp_min(query_least).log() - key_HP.clamp_min(key_least).log()) / 4
    centred_HP = log_HP - log_HP.mean(-1, keepdim=True)
    most = float(torch.tensor(_MOST).log())
    return centred_HP.clamp(-most, most).exp()
