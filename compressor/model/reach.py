"""How many tokens a model reads, from its config alone. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MULTIPLIED = ("linear", "dynamic")
_MOST = 2**53


def reach(text: Mapping[str, Any]) -> int | None:
    """Tokens that a language model reads, or None where its config does not say.

    ``max_position_embeddings``; where frequencies are scaled linearly or dynamically, times the factor, but
    for Gemma 3: such configs state the length before scaling (vLLM 0.32 config/model.py,
    _get_and_verify_max_len).

    Args:
        text: the language model's part of config.json, or what transformers makes of it.
    """
    found = text.get("max_position_embeddings")
    if type(found) is not int or not 1 <= found <= _MOST:
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(scaling, Mapping) or "gemma3" in str(text.get("model_type")):
        return found
    # One object, or one for each kind of layers, all that are scaled alike.
    told = [scaling, *(kind for kind in scaling.values() if isinstance(kind, Mapping))]
    factors: list[Any] = [
        one.get("factor") for one in told if one.get("rope_type", one.get("type")) in _MULTIPLIED
    ]
    factor: Any = factors[0] if factors else None
    if type(factor) not in (int, float) or not 1 <= factor <= _MOST / found:
        return found
    return int(found * factor)
