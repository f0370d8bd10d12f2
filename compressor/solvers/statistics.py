"""What calibration measures of one matrix's inputs: their second moments, gathered batch by batch.

Legend: N rows (tokens) of a batch, I in_features, O rows of the matrices that read the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from compressor.numerics.row_weights import LONGEST, norm_weights, row_norms

# Rows multiplied at once on the CPU: bounds the fp32 copy, and the length of one sum.
CHUNK_ROWS = 2048
# Columns multiplied at once on the CPU, so that of a symmetric product little more than half is computed.
CHUNK_COLUMNS = 192


@dataclass(frozen=True)
class Moments:
    """Sums over the tokens that reached a matrix, in fp32; divide by ``rows`` for means.

    Attributes:
        second_II: sum of w xhat xhat^T over the inputs that the quantized model feeds.
        change_II: sum of w (x - xhat) xhat^T, x the source model's inputs of the same tokens; None if those
            are not known, or where ``pull_OI`` is.
        rows: how many tokens.
        pull_OI: W ``change_II`` for the matrices W that read the inputs, one below the other, where they have
            fewer rows than columns; else None. A solver may overwrite it.
    """

    second_II: torch.Tensor
    change_II: torch.Tensor | None
    rows: int
    pull_OI: torch.Tensor | None = None

    @property
    def changes(self) -> torch.Tensor | None:
        """What is known of the source model's inputs, in either form."""
        return self.change_II if self.pull_OI is None else self.pull_OI

    def of_rows(self, rows: slice) -> Moments:
        """The same for some of the matrices' rows."""
        return self if self.pull_OI is None else replace(self, pull_OI=self.pull_OI[rows])


class MomentSums:
    """Gathers ``Moments``; deterministic for the same batches in the same order (and threads of torch).

    Massive activations: in many models the first token of a sequence has inputs hundreds of times as long as
    any other's. Unweighted, its one direction would be most of H, and an error there would be traded for any
    error elsewhere. A network normalises what it adds up, so such a row's *relative* error is what matters: a
    row longer than ``longest`` times its batch's median has a weight w that makes it so long, or up to half
    as long: its root is a power of two. Others have w = 1.

    bf16 inputs are multiplied as they are. On an accelerator their products are summed in fp32; on the CPU
    those of ``CHUNK_ROWS`` rows are, then rounded to bf16 and summed in fp32: an error of 2^-9 of each such
    sum, where so few tokens leave one of 2^-6 or more in what they say of other text.

    Args:
        in_features: I.
        device: where the sums live: one or two fp32 [I, I].
        with_change: whether ``add`` gets the source model's inputs too.
        longest: the cap, in medians of the batch's norms.
        weight_OI: the matrices that read the inputs, in the inputs' dtype: with fewer rows than columns, what
            the change does to their outputs is summed instead, in [O, I].
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str,
        with_change: bool,
        *,
        longest: float = LONGEST,
        weight_OI: torch.Tensor | None = None,
    ) -> None:
        pulls = with_change and weight_OI is not None and len(weight_OI) < in_features
        self._weight_OI = weight_OI if pulls else None
        rows = len(weight_OI) if weight_OI is not None and pulls else in_features
        self._second_II = torch.zeros(in_features, in_features, device=device)
        # [O, I] or [I, I]
        self._change = torch.zeros(rows, in_features, device=device) if with_change else None
        self._rows = 0
        self._longest = longest

    def add(self, fed_NI: torch.Tensor, original_NI: torch.Tensor | None = None) -> None:
        """Adds a batch: the inputs fed, and with ``with_change`` the source model's, of the same tokens.

        A batch of no rows adds nothing. Few rows make a poor median: give whole batches of tokens.
        """
        assert (original_NI is None) == (self._change is None), "with_change needs both streams"
        if len(fed_NI) == 0:
            return
        self._add(fed_NI, original_NI, _roots(row_norms(fed_NI), self._longest))

    def _add(self, fed_NI: torch.Tensor, original_NI: torch.Tensor | None, root_N1: torch.Tensor) -> None:
        whole, dtype = fed_NI.is_cuda, torch.bfloat16 if fed_NI.dtype == torch.bfloat16 else torch.float32
        step = len(fed_NI) if whole else CHUNK_ROWS
        for first in range(0, len(fed_NI), step):
            chosen = slice(first, first + step)
            root, fed = root_N1[chosen].to(dtype), fed_NI[chosen].to(dtype)
            scaled = fed * root
            if original_NI is not None and self._change is not None:
                change = (original_NI[chosen].to(dtype) - fed).mul_(root)
                if self._weight_OI is not None:
                    change = change @ self._weight_OI.to(dtype).T
                _add_product(self._change, change, scaled)
            if whole:
                _add_product(self._second_II, scaled, scaled)
                continue
            for start in range(0, scaled.shape[1], CHUNK_COLUMNS):
                left = scaled[:, start : start + CHUNK_COLUMNS]
                _add_product(self._second_II[start : start + CHUNK_COLUMNS, start:], left, scaled[:, start:])
        self._rows += len(fed_NI)

    def result(self) -> Moments:
        """What has been gathered; the tensors are the sums themselves, not copies."""
        if not self._second_II.is_cuda:
            mirror(self._second_II)
        if self._weight_OI is None:
            return Moments(self._second_II, self._change, self._rows)
        return Moments(self._second_II, None, self._rows, self._change)


@dataclass(frozen=True)
class Routed:
    """The rows of one batch that reach one of several matrices, such as experts.

    Attributes:
        sums: that the rows are added to; None where they only tell what is long.
        norm_N: of the rows.
        fed_NI: the rows as they are multiplied, perhaps rounded; not looked at without ``sums``.
    """

    sums: MomentSums | None
    norm_N: torch.Tensor
    fed_NI: torch.Tensor


def add_together(rows: Sequence[Routed]) -> None:
    """Adds the rows of one batch, where those are long that are so beside the median of all of them."""
    rows = [routed for routed in rows if len(routed.norm_N)]
    if not rows:
        return
    root_N1 = _roots(torch.cat([routed.norm_N for routed in rows]), LONGEST)
    split = torch.split(root_N1, [len(routed.norm_N) for routed in rows])
    for routed, own_N1 in zip(rows, split, strict=True):
        if routed.sums is not None:
            routed.sums._add(routed.fed_NI, None, own_N1)


def _roots(norm_N: torch.Tensor, longest: float) -> torch.Tensor:
    """[N, 1]: the roots of the weights of rows with these norms."""
    _, exponent_N = torch.frexp(norm_weights(norm_N, longest).sqrt_())
    return torch.ldexp(torch.ones_like(exponent_N, dtype=torch.float32), exponent_N - 1)[:, None]


def _add_product(sum_OI: torch.Tensor, left_NO: torch.Tensor, right_NI: torch.Tensor) -> None:
    """Adds left^T right, summed by itself first: no long fp32 sum swallows small terms."""
    if left_NO.is_cuda and left_NO.dtype != sum_OI.dtype:
        torch.addmm(sum_OI, left_NO.T, right_NI, out_dtype=sum_OI.dtype, out=sum_OI)
    else:
        sum_OI += left_NO.T @ right_NI


def mirror(h_II: torch.Tensor) -> None:
    """What lies below the diagonal becomes what lies above it."""
    for start in range(0, len(h_II), CHUNK_COLUMNS):
        own = slice(start, start + CHUNK_COLUMNS)
        block = h_II[own, own].triu()
        h_II[own, own] = block + block.triu(1).T
        h_II[own.stop :, own] = h_II[own, own.stop :].T
