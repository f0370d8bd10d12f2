"""Hears what attention reads: keys and values as the cache stores them (after rotary positions), and queries.

transformers hands every attention of a model through one table of functions (``ALL_ATTENTION_FUNCTIONS``,
transformers 5.17 modeling_utils.py); here an entry of the table is wrapped for the time of a pass. It works
on a whole model and on a block of the tape alike. Masks and the model's choice of function stay as they are.

Legend: B sequences, T tokens, Q query heads, H KV heads, D head_dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.checkpoint.base import Source
from compressor.errors import CheckpointError
from compressor.model.families import text_config

_Kernel = Callable[..., tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class HeardAttention:
    """One call of one layer's attention.

    Attributes:
        layer: index of the layer, as caches count them.
        module: the attention module.
        query_BQTD: after rotary positions.
        key_BHTD: after rotary positions, one for each KV head.
        value_BHTD: the same.
        scaling: what logits are multiplied by.
    """

    layer: int
    module: nn.Module
    query_BQTD: torch.Tensor
    key_BHTD: torch.Tensor
    value_BHTD: torch.Tensor
    scaling: float
    _attend: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def attend(self, key_BHTD: torch.Tensor, value_BHTD: torch.Tensor) -> torch.Tensor:
        """[B, T, Q, D]: what the layer's attention makes of other keys and values."""
        return self._attend(key_BHTD, value_BHTD)


# Told every call; may give other keys and values (both [B, H, T, D]) to be read in their place.
Hear = Callable[[HeardAttention], "tuple[torch.Tensor, torch.Tensor] | None"]


def check_hearable(source: Source) -> None:
    """Refuses, from the config alone, a model whose keys and values cannot be heard.

    Raises:
        CheckpointError: latent attention caches no keys and values; keys and values of different widths.
    """
    config = text_config(source.config)
    if config.get("kv_lora_rank") is not None:
        raise CheckpointError(
            "multi-head latent attention caches one latent vector a token, not keys and values, so no KV "
            "format applies",
            where=source.label,
            fix="remove kv_cache from the recipe",
        )


def rotary_frequencies(model: nn.Module) -> torch.Tensor | None:
    """fp32 [P], radians a token of the rotary pairs; None without rotary positions, or with several kinds.

    ``model``: with its buffers. transformers keeps them as ``inv_freq``; which coordinates make a pair is not
    told there.
    """
    found = [buffer.float() for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    if not found or any(not torch.equal(found[0], other) for other in found[1:]):
        return None
    return found[0]


@contextmanager
def heard_attention(module: nn.Module, hear: Hear) -> Iterator[None]:
    """Tells ``hear`` every attention of ``module`` (a model or a block) that runs within the context.

    Raises:
        CheckpointError: an attention of it does not go through transformers' table of functions. Whether any
            does is known only afterwards: count what was heard.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as TABLE

    inside = {id(inner) for inner in module.modules()}
    names = {
        str(name)
        for inner in module.modules()
        if (config := getattr(inner, "config", None)) is not None
        and (name := getattr(config, "_attn_implementation", None)) is not None
    }
    if not names:
        raise CheckpointError("its attention does not say which function computes it, so it cannot be heard")
    before = {name: TABLE._local_mapping.get(name) for name in names}
    for name in names:
        TABLE[name] = _wrapped(TABLE.get(name), inside, hear)
    try:
        yield
    finally:
        for name, kernel in before.items():
            del TABLE[name]
            if kernel is not None:
                TABLE[name] = kernel


def _wrapped(kernel: _Kernel | None, inside: set[int], hear: Hear) -> _Kernel:
    """A function that tells ``hear`` first; ``kernel`` None: that of the model's file."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        run = kernel if kernel is not None else _eager(module)
        layer = getattr(module, "layer_idx", None)
        if layer is None or id(module) not in inside:
            return run(module, query, key, value, attention_mask, **options)
        if key.shape != value.shape or query.shape[1] % key.shape[1]:
            raise CheckpointError(
                f"layer {layer}: keys {list(key.shape)} and values {list(value.shape)} differ in shape, "
                "so no KV format applies"
            )

        def attend(other_key: torch.Tensor, other_value: torch.Tensor) -> torch.Tensor:
            return run(module, query, other_key, other_value, attention_mask, **options)[0]

        scaling = options.get("scaling")
        scaling = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
        given = hear(HeardAttention(layer, module, query, key, value, scaling, attend))
        if given is not None:
            key, value = given
        return run(module, query, key, value, attention_mask, **options)

    return attention


def _eager(module: nn.Module) -> _Kernel:
    """The plain attention of the file that defines the module.

    Raises:
        CheckpointError: it has none.
    """
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise CheckpointError(f"{type(module).__name__} has no attention function that could be heard")
    kernel: _Kernel = found
    return kernel
