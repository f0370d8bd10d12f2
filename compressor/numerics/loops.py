"""Texts that run in circles: what models write when they are stuck, and what any draft foretells.

Legend: N sequences, T tokens.
"""

from __future__ import annotations

import torch

# A circle of more tokens than these is a text that repeats itself, such as a table.
_LONGEST = 64
# So much of a text at its end must be nothing but the circle, at least this many times over.
_SHARE = 0.25
_TURNS = 3


def looping(ids_NT: torch.Tensor) -> torch.Tensor:
    """bool [N]: whether a sequence ends in a circle of up to 64 tokens.

    The circle fills the last quarter of the sequence at least, and goes round three times.
    """
    length = ids_NT.shape[1]
    found_N = torch.zeros(len(ids_NT), dtype=torch.bool, device=ids_NT.device)
    for period in range(1, min(_LONGEST, length - 1) + 1):
        same_NT = ids_NT[:, period:] == ids_NT[:, :-period]
        # Tokens at the end that are those of a period before.
        repeated_N = same_NT.flip(1).int().cumprod(dim=1).sum(dim=1)
        found_N |= repeated_N + period >= max(_TURNS * period, int(_SHARE * length), _TURNS + 1)
    return found_N
