"""The fitted codec: keys or values of a layer, all heads together, in bytes that each name one centroid.

A token's vector of all KV heads is centred and turned into coordinates by a fitted matrix; groups of
coordinates are rounded to the nearest of 256 fitted centroids, and the slot is the centroids' numbers. Head
``h`` stores bytes ``h * S`` to ``(h + 1) * S``; which heads they speak of is the matrix's business. How
matrix and centroids are found: ``fit_codec.py``.

Legend: B sequences, H KV heads, T tokens, D head_dim, E = H * D, C coordinates, G groups (one byte each),
S bytes of a slot, P coordinates of the largest group, K centroids, N tokens at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch

from compressor.kv.base import KvCodec

CENTROIDS = 256
MOST_ELEMENTS = 2**16  # of a token in all heads
MOST_IN_GROUP = 32
# Distances to all centroids that are alive at once.
_CHUNK_BYTES = 32 * 2**20


class FittedCodec(KvCodec):
    """See the module.

    Args:
        kv_heads: H.
        head_dim: D.
        mean: fp32 [E], subtracted from what is stored. A constant added to all keys of a head changes no
            attention.
        forward: fp32 [E, C], from centred vectors to coordinates.
        backward: fp32 [C, E], back.
        groups: int64 [C], to which byte a coordinate belongs; every byte has one coordinate at least.
        centroids: fp32 [K, C], the centroid with number k of each byte, in the byte's own coordinates.

    Raises:
        ValueError: shapes that do not go together, or values that are not finite.
    """

    kind: ClassVar[str] = "fitted"
    kv_heads: int

    def __init__(
        self,
        *,
        kv_heads: int,
        head_dim: int,
        mean: torch.Tensor,
        forward: torch.Tensor,
        backward: torch.Tensor,
        groups: torch.Tensor,
        centroids: torch.Tensor,
    ) -> None:
        self.kv_heads = _size(kv_heads, "kv_heads")
        self.head_dim = _size(head_dim, "head_dim")
        elements = self.kv_heads * self.head_dim
        if elements > MOST_ELEMENTS:
            raise ValueError(f"{elements} elements a token, {MOST_ELEMENTS} at most")
        if groups.dim() != 1 or groups.dtype != torch.int64:
            raise ValueError("groups must be one int64 for each coordinate")
        coordinates = len(groups)
        _check(mean, (elements,), "mean")
        _check(forward, (elements, coordinates), "forward")
        _check(backward, (coordinates, elements), "backward")
        _check(centroids, (CENTROIDS, coordinates), "centroids")
        numbers = torch.unique(groups)
        if not len(numbers) or not torch.equal(numbers, torch.arange(len(numbers))):
            raise ValueError("groups must be numbered from 0 without gaps")
        if coordinates > elements or int(torch.bincount(groups).max()) > MOST_IN_GROUP:
            raise ValueError(f"at most {elements} coordinates, {MOST_IN_GROUP} in a byte")
        if len(numbers) % self.kv_heads:
            raise ValueError(f"{len(numbers)} bytes cannot be shared out evenly to {self.kv_heads} heads")
        self._mean_E, self._forward_EC, self._backward_CE = mean, forward, backward
        self._groups_C, self._centroids_KC = groups, centroids
        self._token_bytes = len(numbers)

    def slot_bytes(self, head_dim: int) -> int:
        """Bytes of one token in one KV head."""
        assert head_dim == self.head_dim
        return self._token_bytes // self.kv_heads

    def problem(self, head_dim: int) -> str | None:
        """Only the heads that it was fitted to."""
        if head_dim != self.head_dim:
            return f"it is fitted to a head_dim of {self.head_dim}, not {head_dim}"
        return None

    def options(self) -> Mapping[str, Any]:
        """The shape of the heads."""
        return {"kv_heads": self.kv_heads, "head_dim": self.head_dim}

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What was fitted."""
        return {
            "mean": self._mean_E,
            "forward": self._forward_EC,
            "backward": self._backward_CE,
            "groups": self._groups_C,
            "centroids": self._centroids_KC,
        }

    def encode(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, T, S]; computed in float32. NaN and infinite input gives any code."""
        batch, heads, tokens, head_dim = x_BHTD.shape
        assert (heads, head_dim) == (self.kv_heads, self.head_dim), "not the heads that it was fitted to"
        self._move(x_BHTD.device)
        x_NE = x_BHTD.transpose(1, 2).reshape(batch * tokens, heads * head_dim).float()
        y_NC = (x_NE - self._mean_E) @ self._forward_EC
        rows = max(1, _CHUNK_BYTES // (4 * CENTROIDS * self._token_bytes))
        chunks = [self._nearest(chunk_NC) for chunk_NC in torch.split(y_NC, rows)]
        codes_NG = torch.cat(chunks) if chunks else y_NC.new_zeros(0, self._token_bytes, dtype=torch.uint8)
        slot = self._token_bytes // heads
        return codes_NG.view(batch, tokens, heads, slot).transpose(1, 2).contiguous()

    def decode(self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, T, D] in ``dtype``; computed in float32."""
        batch, heads, tokens, _ = slots_BHTS.shape
        assert (heads, head_dim) == (self.kv_heads, self.head_dim), "not the heads that it was fitted to"
        self._move(slots_BHTS.device)
        codes_NG = slots_BHTS.transpose(1, 2).reshape(batch * tokens, self._token_bytes).long()
        y_NC = self._centroids_KC.gather(0, codes_NG[:, self._groups_C])
        x_NE = torch.addmm(self._mean_E, y_NC, self._backward_CE)
        return x_NE.view(batch, tokens, heads, head_dim).transpose(1, 2).to(dtype).contiguous()

    def _nearest(self, y_NC: torch.Tensor) -> torch.Tensor:
        """uint8 [N, G]: for each group the number of the centroid nearest to its coordinates."""
        places_GP, book_GKP, half_G1K = self._by_group
        padded_NC = torch.nn.functional.pad(y_NC, (0, 1))
        y_GNP = padded_NC[:, places_GP].transpose(0, 1)
        # Distance, less what is the same for all centroids, halved and with the sign turned.
        near_GNK = torch.baddbmm(half_G1K, y_GNP, book_GKP.mT, beta=-1)
        return near_GNK.argmax(-1).T.to(torch.uint8)

    @cached_property
    def _by_group(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Coordinates [G, P] of the groups, their centroids [G, K, P] and half their squares [G, 1, K].

        Groups with fewer than P coordinates read one more that is always zero.
        """
        groups_C, coordinates = self._groups_C, len(self._groups_C)
        order_C = torch.argsort(groups_C, stable=True)
        counts_G = torch.bincount(groups_C)
        first_G = counts_G.cumsum(0) - counts_G
        rank_C = torch.arange(coordinates, device=groups_C.device) - first_G.repeat_interleave(counts_G)
        places_GP = groups_C.new_full((len(counts_G), int(counts_G.max())), coordinates)
        places_GP[groups_C[order_C], rank_C] = order_C
        book_GKP = torch.nn.functional.pad(self._centroids_KC, (0, 1))[:, places_GP].transpose(0, 1)
        return places_GP, book_GKP.contiguous(), (book_GKP.square().sum(-1) / 2)[:, None]

    def _move(self, device: torch.device) -> None:
        """Follows the cache to its device, once."""
        if self._mean_E.device != device:
            self.__dict__.pop("_by_group", None)
            for name in ("_mean_E", "_forward_EC", "_backward_CE", "_groups_C", "_centroids_KC"):
                setattr(self, name, getattr(self, name).to(device))


def _size(value: object, name: str) -> int:
    if type(value) is not int or not 1 <= value <= MOST_ELEMENTS:
        raise ValueError(f"{name} is no size: {str(value)[:40]}")
    return value


def _check(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not float32 {list(shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has values that are not finite")
