"""How much memory the training of adapters takes, and whether its blocks are computed twice to save some.

No torch here: plans ask too.
"""

from __future__ import annotations

from typing import Any

from compressor.device import available_device_bytes, available_memory_bytes
from compressor.model.families.naming import text_config

# Logits alive at a time, by device; a few copies of them are.
CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
# Of the free memory; the rest is for fragments, and for what the estimate does not know.
_USABLE = 0.8
# Of configs that do not say; larger than most.
_ASSUMED = {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80}


def kept_bytes(config: dict[str, Any], length: int, width: int, *, recomputed: bool) -> int:
    """Bytes that a model with frozen matrices keeps of a sequence for its way back.

    Of a block: its norms' inputs in fp32, what they make of them, queries, keys, values and what attention
    makes of them (twice: the projection's adapter reads it too), gate, its activation and up. Of blocks that
    are computed again only their inputs and what attention makes, and one whole block.

    Args:
        config: contents of config.json.
        length: tokens.
        width: bytes of a number.
        recomputed: whether blocks are computed again.
    """
    hidden, queries = _number(config, "hidden_size"), attention_width(config)
    heads = _number(config, "num_attention_heads")
    keys = queries // heads * _number(config, "num_key_value_heads", heads)
    inner = _number(config, "intermediate_size", 4 * hidden)
    token = 2 * hidden * (4 + 2 * width) + width * (3 * queries + 2 * keys) + 3 * width * inner
    blocks = blocks_of(config)
    if not recomputed:
        return length * blocks * token
    return length * (blocks * width * (hidden + queries) + 2 * token)


def attention_width(config: dict[str, Any]) -> int:
    """Query heads times elements of a head."""
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    return heads * _number(config, "head_dim", max(1, hidden // heads))


def blocks_of(config: dict[str, Any]) -> int:
    """Repeated blocks."""
    return _number(config, "num_hidden_layers")


def recomputes(config: dict[str, Any], length: int, width: int, device: str) -> bool:
    """Whether blocks must forget what they compute: all together would not fit into what is free now."""
    free = available_device_bytes() if device == "cuda" else available_memory_bytes()
    return kept_bytes(config, length, width, recomputed=False) > _USABLE * free


def _number(config: dict[str, Any], key: str, default: int = 0) -> int:
    """A positive integer of the language model's part of a config."""
    found = text_config(config).get(key)
    # bool is a subclass of int, so compare the type itself
    if type(found) is int and found > 0:
        return found
    return default or _ASSUMED[key]
