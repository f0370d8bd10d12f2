"""What is heard of the keys and values of one layer, in bounded memory: all that fitting and allocation need.

Legend: B sequences, T tokens, Q query heads, H KV heads, D head_dim, E = H * D, N tokens kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressor.kv.base import KvCodec
from compressor.kv.fitted_rotary import turned


class SideStatistics:
    """Of keys, or of values.

    Args:
        heads: H.
        head_dim: D.
        most_rows: tokens kept for centroids and covariance, at most.

    Attributes:
        metric_EE: fp64, sum over tokens of g g, with g the loss's gradient.
        tokens: that were heard with gradients.
        errors: name of a codec -> sum over tokens of what it does to the loss; see ``try_codecs``.
    """

    def __init__(self, heads: int, head_dim: int, most_rows: int) -> None:
        elements = heads * head_dim
        self.metric_EE = torch.zeros(elements, elements, dtype=torch.float64)
        self.tokens = 0
        self.errors: dict[str, float] = {}
        self._most_rows = most_rows
        self._rows: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._kept = self._seen = 0

    @property
    def rows_NE(self) -> torch.Tensor:
        """fp32 [N, E]: tokens that were kept."""
        return torch.cat(self._rows).float()

    @property
    def counts_N(self) -> torch.Tensor:
        """fp32 [N]: squared norms of the gradients there; ones where there were none."""
        return torch.cat(self._counts)

    def add(self, x_BHTD: torch.Tensor, gradient_BHTD: torch.Tensor | None, sink: int, stride: int) -> None:
        """Hears keys or values of a pass.

        Args:
            x_BHTD: from the first token of each sequence on.
            gradient_BHTD: of the sum of the losses of all tokens; None where it is not known.
            sink: so many first tokens are neither kept nor counted: they are stored in 16 bit.
            stride: every so many tokens one is kept.
        """
        x_NE = _flat(x_BHTD[:, :, sink:])
        g_NE = None if gradient_BHTD is None else _flat(gradient_BHTD[:, :, sink:])
        if g_NE is not None:
            self.metric_EE += (g_NE.T @ g_NE).double().cpu()
            self.tokens += len(g_NE)
        first = -self._seen % stride
        kept_N = torch.arange(first, max(first, len(x_NE)), stride)[: self._most_rows - self._kept]
        rows_NE = x_NE[kept_N].cpu()
        # float16 holds what models compute in bfloat16, but for outliers that it would make infinite.
        self._rows.append(rows_NE.clamp(-65504, 65504).half())
        self._counts.append(
            torch.ones(len(kept_N)) if g_NE is None else g_NE[kept_N].square().sum(-1).float().cpu()
        )
        self._kept += len(kept_N)
        self._seen += len(x_NE)

    def try_codecs(
        self, x_BHTD: torch.Tensor, gradient_BHTD: torch.Tensor, codecs: Mapping[str, KvCodec]
    ) -> None:
        """Adds what each codec's error does to the loss: half the sum over tokens of (g e)^2.

        That is the second-order term of the loss with its Fisher information for the Hessian, for errors of
        different tokens that have nothing to do with one another. No token is exempt.
        """
        for name, codec in codecs.items():
            stored = codec.decode(codec.encode(x_BHTD), x_BHTD.shape[-1], torch.float32)
            moved_BT = ((stored - x_BHTD.float()) * gradient_BHTD.float()).sum((1, 3))
            self.errors[name] = self.errors.get(name, 0.0) + 0.5 * float(moved_BT.double().square().sum())


class LayerStatistics:
    """Of one layer.

    Attributes:
        keys: after rotary positions.
        values: as they are.
        query_HDD: fp64, sum over tokens and the query heads of each KV head of q q.
        turned_keys: keys with their rotary positions undone; None where these are not known.
        turned_query_HDD: as ``query_HDD``, of queries turned back each by its own position.
    """

    def __init__(self, heads: int, head_dim: int, most_rows: int) -> None:
        self.heads, self.head_dim = heads, head_dim
        self.keys = SideStatistics(heads, head_dim, most_rows)
        self.values = SideStatistics(heads, head_dim, most_rows)
        self.query_HDD = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64)
        self.turned_keys: SideStatistics | None = None
        self.turned_query_HDD = torch.zeros_like(self.query_HDD)

    def add_queries(self, query_BQTD: torch.Tensor, frequencies_P: torch.Tensor | None) -> None:
        """Hears the queries of a pass from the first token on."""
        query_BQTD = query_BQTD.detach()
        self.query_HDD += self._moments(query_BQTD)
        if frequencies_P is not None:
            self.turned_query_HDD += self._moments(turned(query_BQTD, frequencies_P, 0, back=True))

    def _moments(self, query_BQTD: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, head_dim = query_BQTD.shape
        shape = (batch, self.heads, heads // self.heads * tokens, head_dim)
        rows = query_BQTD.reshape(shape).transpose(0, 1).flatten(1, 2).float()
        return (rows.mT @ rows).double().cpu()

    def add_turned_keys(
        self,
        key_BHTD: torch.Tensor,
        gradient_BHTD: torch.Tensor | None,
        frequencies_P: torch.Tensor,
        most_rows: int,
        sink: int,
        stride: int,
    ) -> SideStatistics:
        """Hears the keys of a pass from the first token on, turned back; see ``SideStatistics.add``."""
        if self.turned_keys is None:
            self.turned_keys = SideStatistics(self.heads, self.head_dim, most_rows)
        gradient = None if gradient_BHTD is None else turned(gradient_BHTD, frequencies_P, 0, back=True)
        self.turned_keys.add(turned(key_BHTD.detach(), frequencies_P, 0, back=True), gradient, sink, stride)
        return self.turned_keys


def _flat(x_BHTD: torch.Tensor) -> torch.Tensor:
    """fp32 [N, E], all heads of a token together."""
    return x_BHTD.detach().transpose(1, 2).flatten(2).flatten(0, 1).float()
