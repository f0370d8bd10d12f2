"""Rows of transformers' caches that hold different numbers of tokens.

Such rows end at the same slot and begin with slots that hold nothing, as prompts padded on the left do: all
that transformers' masks know of. A row that forgets more tokens than another moves right by the difference.

Legend: B rows, H heads, S slots, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

# Their ``crop`` is known to leave no trace; subclasses may hold more than it knows of.
_BY_TOKEN = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)


def holds_tokens(layer: Any) -> bool:
    """Whether a cache's layer holds a slot for each token and nothing else."""
    return type(layer) in _BY_TOKEN


def can_forget(layer: Any) -> bool:
    """Whether ``crop`` brings a layer back to what it was before its last tokens.

    It does not where a recurrent state has taken them up (transformers 5.17 cache_utils.py,
    LinearAttentionCacheLayerMixin.is_croppable); of a state that was never filled nothing is known.
    """
    return holds_tokens(layer) or (type(layer) is LinearAttentionLayer and layer.is_croppable)


def move_right(cache: Cache, by_B: torch.Tensor) -> None:
    """Moves each row's slots right; what falls off comes in again on the left, where a mask must hide it."""
    for layer in cache.layers:
        assert holds_tokens(layer)
        slots = layer.keys.shape[-2]
        from_BS = (torch.arange(slots)[None] - by_B[:, None]).remainder(slots).to(layer.keys.device)
        layer.keys = layer.keys.take_along_dim(from_BS[:, None, :, None], dim=2)
        layer.values = layer.values.take_along_dim(from_BS[:, None, :, None], dim=2)
        if _has_index(layer):
            layer.indexer_keys = layer.indexer_keys.take_along_dim(from_BS[:, :, None], dim=1)


def set_aside(cache: Cache, aside: dict[int, list[Any]]) -> None:
    """Takes from layers with a window what the next token does not see, and appends it to ``aside``.

    A layer that records its past keeps every slot until ``crop``, but its mask counts on a window of them
    (transformers 5.17, DynamicSlidingWindowLayer): it can be read through once before that, not twice.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) is not DynamicSlidingWindowLayer:
            continue
        slots = layer.keys.shape[-2] - (layer.sliding_window - 1)
        if slots > 0:
            aside.setdefault(number, []).append((layer.keys[:, :, :slots], layer.values[:, :, :slots]))
            layer.keys, layer.values = layer.keys[:, :, slots:], layer.values[:, :, slots:]


def put_back(cache: Cache, aside: dict[int, list[Any]]) -> None:
    """Puts what was set aside before what the layers hold, and empties ``aside``."""
    for number, parts in aside.items():
        layer: Any = cache.layers[number]
        layer.keys = torch.cat([*(keys for keys, _ in parts), layer.keys], dim=2)
        layer.values = torch.cat([*(values for _, values in parts), layer.values], dim=2)
    aside.clear()


def drop_left(cache: Cache, slots: int) -> int:
    """Drops the first slots of every row, where no row holds anything; returns how many were dropped.

    None where a layer has a window: it counts the slots that it has seen.
    """
    if slots == 0 or any(layer.is_sliding for layer in cache.layers):
        return 0
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, slots:], layer.values[:, :, slots:]
        if _has_index(layer):
            layer.indexer_keys = layer.indexer_keys[:, slots:]
    return slots


def _has_index(layer: Any) -> bool:
    return isinstance(layer, DynamicIndexedLayer) and layer.is_indexer_initialized
