"""What calibration measures of one matrix's inputs: their second moments, gathered batch by batch.

Legend: N rows (tokens) of a batch, I in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compressor.numerics.row_weights import LONGEST, row_weights

# Rows multiplied at once: bounds the fp32 copy, and the length of one fp32 sum.
CHUNK_ROWS = 2048


@dataclass(frozen=True)
class Moments:
    """Sums over the tokens that reached a matrix, in fp32; divide by ``rows`` for means.

    Attributes:
        second_II: sum of w xhat xhat^T over the inputs that the quantized model feeds.
        cross_II: sum of w x xhat^T, x the source model's inputs of the same tokens; None if not known.
        rows: how many tokens.
    """

    second_II: torch.Tensor
    cross_II: torch.Tensor | None
    rows: int


class MomentSums:
    """Gathers ``Moments``; deterministic for the same batches in the same order (and threads of torch).

    Massive activations: in many models the first token of a sequence has inputs hundreds of times as long as
    any other's. Unweighted, its one direction would be most of H, and an error there would be traded for any
    error elsewhere. A network normalises what it adds up, so such a row's *relative* error is what matters: a
    row longer than ``longest`` times its batch's median has the weight w that makes it so long; others w = 1.

    Args:
        in_features: I.
        device: where the sums live: one or two fp32 [I, I].
        with_cross: whether ``add`` gets the source model's inputs too.
        longest: the cap, in medians of the batch's norms.
    """

    def __init__(
        self, in_features: int, device: torch.device | str, with_cross: bool, *, longest: float = LONGEST
    ) -> None:
        self._second_II = torch.zeros(in_features, in_features, device=device)
        self._cross_II = torch.zeros_like(self._second_II) if with_cross else None
        self._rows = 0
        self._longest = longest

    def add(self, fed_NI: torch.Tensor, original_NI: torch.Tensor | None = None) -> None:
        """Adds a batch: the inputs fed, and with ``with_cross`` the source model's, of the same tokens.

        A batch of no rows adds nothing. Few rows make a poor median: give whole batches of tokens.
        """
        assert (original_NI is None) == (self._cross_II is None), "with_cross needs both streams"
        if len(fed_NI) == 0:
            return
        root_N1 = row_weights(fed_NI, self._longest).sqrt_()[:, None]
        for start in range(0, len(fed_NI), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            fed = fed_NI[rows].float() * root_N1[rows]
            # each product is summed by itself first, so no long fp32 sum swallows small terms
            self._second_II += fed.T @ fed
            if original_NI is not None and self._cross_II is not None:
                self._cross_II += (original_NI[rows].float() * root_N1[rows]).T @ fed
        self._rows += len(fed_NI)

    def result(self) -> Moments:
        """What has been gathered; the tensors are the sums themselves, not copies."""
        return Moments(self._second_II, self._cross_II, self._rows)
