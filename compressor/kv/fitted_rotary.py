"""The fitted codec for keys with their rotary positions undone, which leaves much less to store.

Before rotation keys lie in few directions; rotation by ever other angles smears these. A cache knows the
number of each token, so keys are turned back by it, stored, and turned again when they are read. Whether that
number is the position does not matter for what is read, only for how well the codec fits (left padding
shifts it).

Legend: B sequences, H KV heads, T tokens, D head_dim, P rotary pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from compressor.kv.fitted import FittedCodec


class RotaryFittedCodec(FittedCodec):
    """``FittedCodec`` of keys turned back.

    Args:
        frequencies: fp32 [P], radians a token of each rotary pair; pair p is coordinates p and p + P, of the
            first 2 P of each head (transformers' ``rotate_half``).
        parts: those of ``FittedCodec``.

    Raises:
        ValueError: as there; or more pairs than a head has, or frequencies that are not finite.
    """

    kind: ClassVar[str] = "fitted_rotary"
    places: ClassVar[bool] = True

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
        frequencies: torch.Tensor,
    ) -> None:
        super().__init__(
            kv_heads=kv_heads,
            head_dim=head_dim,
            mean=mean,
            forward=forward,
            backward=backward,
            groups=groups,
            centroids=centroids,
        )
        if frequencies.dtype != torch.float32 or frequencies.dim() != 1 or not len(frequencies):
            raise ValueError("frequencies must be one fp32 number for each rotary pair")
        if 2 * len(frequencies) > head_dim or not torch.isfinite(frequencies).all():
            raise ValueError("frequencies of more pairs than a head has, or not finite")
        self._frequencies_P = frequencies

    @classmethod
    def of(cls, codec: FittedCodec, frequencies_P: torch.Tensor) -> RotaryFittedCodec:
        """``codec`` for keys that were turned back when it was fitted."""
        tensors: dict[str, Any] = dict(codec.tensors())
        return cls(
            kv_heads=codec.kv_heads, head_dim=codec.head_dim, frequencies=frequencies_P.float(), **tensors
        )

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What was fitted, and the frequencies."""
        return {**super().tensors(), "frequencies": self._frequencies_P}

    def encode(self, x_BHTD: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, T, S] of the first tokens of a sequence."""
        return self.encode_at(x_BHTD, 0)

    def decode(self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, T, D] of the first tokens of a sequence."""
        return self.decode_at(slots_BHTS, head_dim, dtype, 0)

    def encode_at(self, x_BHTD: torch.Tensor, first: int) -> torch.Tensor:
        """uint8 [B, H, T, S] of tokens from number ``first`` on."""
        return super().encode(turned(x_BHTD, self._frequencies_P, first, back=True))

    def decode_at(
        self, slots_BHTS: torch.Tensor, head_dim: int, dtype: torch.dtype, first: int
    ) -> torch.Tensor:
        """[B, H, T, D] of tokens from number ``first`` on."""
        stored = super().decode(slots_BHTS, head_dim, torch.float32)
        return turned(stored, self._frequencies_P, first, back=False).to(dtype)


def turned(x_BHTD: torch.Tensor, frequencies_P: torch.Tensor, first: int, *, back: bool) -> torch.Tensor:
    """fp32 [B, H, T, D]: pairs of token t turned by ``first + t`` times their frequencies, or ``back``."""
    pairs, tokens = len(frequencies_P), x_BHTD.shape[2]
    numbers_T = torch.arange(first, first + tokens, device=x_BHTD.device, dtype=torch.float32)
    angles_TP = numbers_T[:, None] * frequencies_P.to(x_BHTD.device)
    cos_TP, sin_TP = angles_TP.cos(), angles_TP.sin() * (-1 if back else 1)
    low, high, rest = torch.split(x_BHTD.float(), [pairs, pairs, x_BHTD.shape[3] - 2 * pairs], dim=-1)
    return torch.cat([low * cos_TP - high * sin_TP, high * cos_TP + low * sin_TP, rest], dim=-1)
