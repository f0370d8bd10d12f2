"""How much each row of a matrix's inputs counts in what calibration sums up.

Legend: N rows (tokens) of a batch, I in_features.
"""

from __future__ import annotations

import torch

# A row whose norm is more than this many times the median of its batch counts as if it were so long.
LONGEST = 8.0


def row_weights(x_NI: torch.Tensor, longest: float = LONGEST) -> torch.Tensor:
    """fp32 [N]: min(1, longest * median norm / norm)^2; all 1 where the median is zero.

    Massive activations: in many models the first token of a sequence has inputs hundreds of times as long as
    any other's. A network normalises what it adds up, so such a row's *relative* error is what matters.
    """
    return norm_weights(row_norms(x_NI), longest)


def row_norms(x_NI: torch.Tensor) -> torch.Tensor:
    """fp32 [N]."""
    # on the CPU torch converts within the reduction several times slower than before it
    wide_NI = x_NI if x_NI.is_cuda else x_NI.float()
    norm_N: torch.Tensor = torch.linalg.vector_norm(wide_NI, dim=1, dtype=torch.float32)
    return norm_N


def norm_weights(norm_N: torch.Tensor, longest: float = LONGEST) -> torch.Tensor:
    """``row_weights`` of rows with these norms."""
    cap = longest * norm_N.median()
    weight_N: torch.Tensor = (cap / torch.maximum(norm_N, cap)).nan_to_num_(nan=1.0).square_()
    return torch.where(cap > 0, weight_N, 1.0)
