"""How much each input channel of a layer counts, as far as it is known without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.spec import InputNorm

if TYPE_CHECKING:
    import torch

_LEAST_IMPORTANCE = 1e-3


def norm_importance(
    source: Source,
    norm: InputNorm | None,
    in_features: int,
    changed: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """fp32 [in_features]: squared weight of the norm before a layer; None where there is no such norm.

    ``changed``: the weights of norms that are not the source's any more, by name.
    """
    if norm is None or norm.tensor not in source.headers:
        return None
    weight_I = (changed or {}).get(norm.tensor)
    if weight_I is None:
        weight_I = source.read(norm.tensor)
    moment_I = (weight_I.float() + norm.offset) ** 2
    largest = float(moment_I.max())
    if not 0.0 < largest < float("inf") or len(moment_I) != in_features:
        return None
    # Channels that the norm all but closes still count a little: the text may open them.
    return moment_I.clamp(min=_LEAST_IMPORTANCE * largest)
