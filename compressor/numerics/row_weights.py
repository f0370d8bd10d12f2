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
    norm_N = torch.linalg.vector_norm(x_NI, dim=1, dtype=torch.float32)
    cap = longest * norm_N.median()
    weight_N: torch.Tensor = (cap / torch.maximum(norm_N, cap)).nan_to_num_(nan=1.0).square_()
    return torch.where(cap > 0, weight_N, 1.0)
