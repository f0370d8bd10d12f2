"""A tiny model, its tokenizer and its caches, for tests of KV evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compressor.evals.kv_feed import KvVariant, Mode
from compressor.kv.cache import LayerCodecs, PackedCache, full_attention_layers
from tests.kv.codecs import Coarse
from tests.tiny import tiny_llama

STEP = 0.5


def tiny(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random model of bytes in float32."""
    tiny_llama(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def cache_of(
    model: PreTrainedModel, mode: Mode, step: float | None, recent: int = 0
) -> Callable[[], PackedCache]:
    """Makes caches with every layer rounded to ``step``; None is the 16-bit cache."""
    if step is None:
        return lambda: PackedCache.of(model.config, {})
    codecs = LayerCodecs(Coarse(step), Coarse(step), recent_tokens=recent)
    layers = dict.fromkeys(full_attention_layers(model.config), codecs)
    return lambda: PackedCache.of(model.config, layers, mode)


def variant(model: PreTrainedModel, mode: Mode, step: float = STEP, recent: int = 0) -> KvVariant:
    """Named by its step and window."""
    return KvVariant(f"{step}/{recent}", cache_of(model, mode, step, recent), recent)


def ids(tokens: int, seed: int = 3) -> torch.Tensor:
    """Random bytes [T]."""
    return torch.randint(32, 127, (tokens,), generator=torch.Generator().manual_seed(seed))
