"""How much memory the training of adapters takes, and whether its blocks are computed twice to save some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.device import available_device_bytes, available_memory_bytes

if TYPE_CHECKING:
    from compressor.stages.adapt_model import AdaptedModel

# Of the free memory; the rest is for fragments, and for what the estimate does not know.
_USABLE = 0.8


def kept_token_bytes(hidden: int, inner: int, queries: int, keys: int, width: int) -> int:
    """Bytes that a block with frozen matrices keeps of a token for its way back.

    Two norms with their input in fp32, queries, keys, values and what attention makes of them (twice: the
    projection's adapter reads it too), gate, its activation and up.

    Args:
        hidden: width of the hidden states.
        inner: of the MLP, all experts that a token passes together.
        queries: heads times head_dim.
        keys: the same of keys, and of values.
        width: bytes of a number.
    """
    return 2 * hidden * (4 + 2 * width) + width * (3 * queries + 2 * keys) + 3 * width * inner


def recomputes(model: AdaptedModel, length: int) -> bool:
    """Whether blocks forget what they compute: all of them together would not fit into what is free now."""
    import torch

    config = model.whole.model.config.get_text_config()
    device = model.whole.model.device
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    width = torch.finfo(model.dtype).bits // 8
    kept = kept_token_bytes(hidden, inner, heads * head_dim, kv_heads * head_dim, width)
    free = available_device_bytes() if device.type == "cuda" else available_memory_bytes()
    return kept * length * len(model.whole.blocks) > _USABLE * free
