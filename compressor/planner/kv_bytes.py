"""Bytes of the attention cache and the recurrent states of one sequence, from a config.json alone.

Counted for one sequence on one device, without an engine's block rounding. Layer kinds and the defaults of
missing keys follow the configuration classes of transformers 5.17 (models/*/configuration_*.py); caches of
multi-head latent attention and recurrent states follow vLLM 0.32 (mamba_utils.py, mla_attention.py).
An architecture that is not listed gives a reason, never a guess.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compressor.model.families import text_config
from compressor.model.reach import reach
from compressor.planner.kv_architectures import (
    ARCHITECTURES,
    REFUSED,
    Architecture,
    CannotTell,
    Config,
    config_int,
    layer_kinds,
    shown,
)

_STATE_BYTES = 2  # convolution states, and Mamba's, are kept in the model's 16-bit type
_DELTA_STATE_BYTES = 4  # the gated delta rule accumulates in fp32


@dataclass(frozen=True, slots=True)
class KvPart:
    """Layers of one kind.

    Attributes:
        kind: ``full``, ``sliding``, ``chunked``, ``latent`` or ``state``.
        layers: how many layers are of this kind and store something.
        token_bytes: bytes that each kept token takes in all of these layers together.
        window: tokens kept at most, or None for all of them.
        state_bytes: bytes that do not depend on the number of tokens.
        explanation: how the numbers come about, for the plan.
    """

    kind: str
    layers: int
    token_bytes: int
    window: int | None
    state_bytes: int
    explanation: str

    def at(self, tokens: int) -> int:
        """Bytes of these layers after ``tokens`` tokens."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return self.token_bytes * kept + self.state_bytes


@dataclass(frozen=True, slots=True)
class KvBytes:
    """Cache of one sequence of ``tokens`` tokens, in bytes.

    Attributes:
        tokens: length of the sequence.
        total_bytes: everything after ``tokens`` tokens.
        per_token_bytes: what each further token of a long sequence adds (windows are full by then).
        state_bytes: the part that does not grow.
        parts: the same by kind of layer.
    """

    tokens: int
    total_bytes: int
    per_token_bytes: int
    state_bytes: int
    parts: tuple[KvPart, ...]


@dataclass(frozen=True, slots=True)
class KvLayer:
    """What one layer that has a cache keeps of each token, or of each sequence.

    Attributes:
        index: position among all layers of the model.
        kind: as of ``KvPart``.
        heads: KV heads; 1 for latent attention, whose vector all heads share; 0 for states.
        head_dim: elements of a key, and of a value; of latent attention those of the one vector.
        window: as of ``KvPart``.
        bytes_16bit: of one token; of a state, of the sequence.
    """

    index: int
    kind: str
    heads: int
    head_dim: int
    window: int | None
    bytes_16bit: int


def kv_bytes(config: dict[str, Any], tokens: int, *, bits: int = 16) -> tuple[KvBytes | None, str]:
    """Cache bytes of one sequence; None and a reason where the config does not tell them.

    Args:
        config: contents of config.json; a nested ``text_config`` is found.
        tokens: length of the sequence.
        bits: bits per stored key or value element (scales not counted); recurrent states keep theirs.
    """
    assert tokens >= 0
    assert bits > 0
    try:
        parts = _parts(*known_config(config), bits)
    except CannotTell as cannot:
        return None, str(cannot)
    known = KvBytes(
        tokens=tokens,
        total_bytes=sum(part.at(tokens) for part in parts),
        per_token_bytes=sum(part.token_bytes for part in parts if part.window is None),
        state_bytes=sum(part.state_bytes for part in parts),
        parts=tuple(parts),
    )
    return known, ""


def kv_layers(config: dict[str, Any]) -> tuple[tuple[KvLayer, ...], str]:
    """The layers that have a cache of their own, in order; none and a reason where the config hides them."""
    try:
        text, architecture = known_config(config)
        kinds = _cached_kinds(text, architecture)
        parts = {kind: _PART[kind](text, 1, 16) for kind in set(kinds)}
        sides = {kind: _sides(text, kind) for kind in set(kinds)}
    except CannotTell as cannot:
        return (), str(cannot)
    return tuple(
        KvLayer(index, parts[kind].kind, *sides[kind], parts[kind].window, parts[kind].at(1))
        for index, kind in enumerate(kinds)
    ), ""


def layer_count(config: dict[str, Any]) -> int:
    """Layers of a model whose cache is known, those without a cache too."""
    return config_int(known_config(config)[0], "num_hidden_layers")


def known_config(config: dict[str, Any]) -> tuple[Config, Architecture]:
    """The language model's config with missing keys filled in, and how its cache is laid out."""
    text = text_config(config)
    model_type = str(text.get("model_type") or f"{config.get('model_type')}_text")
    if model_type in REFUSED:
        raise CannotTell(REFUSED[model_type])
    architecture = ARCHITECTURES.get(model_type) or ARCHITECTURES.get(f"{model_type}_text")
    if architecture is None:
        raise CannotTell(f"how the cache of model_type {shown(model_type)} is laid out is not known")
    return {**architecture.defaults, **text}, architecture


def full_context(config: dict[str, Any]) -> int | None:
    """Tokens that the language model reads, or None where the config does not say (``reach``)."""
    return reach(text_config(config))


def _parts(config: Config, architecture: Architecture, bits: int) -> list[KvPart]:
    """The parts of a config whose missing keys were filled in."""
    kinds = _cached_kinds(config, architecture)
    return [_PART[kind](config, layers, bits) for kind, layers in Counter(kinds).items()]


def _cached_kinds(config: Config, architecture: Architecture) -> list[str]:
    """Kinds of the layers but the last ones, where these share the cache of others."""
    kinds = layer_kinds(config, architecture)
    stated = config.get("num_kv_shared_layers")
    shared = 0 if stated is None else config_int(config, "num_kv_shared_layers", least=0)
    return kinds[:-shared] if 0 < shared < len(kinds) else kinds


# --- parts: bytes of the layers of one kind ---


def _sides(config: Config, kind: str) -> tuple[int, int]:
    """KV heads, and elements of each, as ``KvLayer`` counts them."""
    if kind == "latent":
        return 1, config_int(config, "kv_lora_rank") + config_int(config, "qk_rope_head_dim")
    return (0, 0) if kind in ("delta", "mamba") else kv_heads(config)


def kv_heads(config: Config) -> tuple[int, int]:
    """KV heads, and elements of a key or value."""
    attention_heads = config_int(config, "num_attention_heads")
    heads = (
        attention_heads
        if config.get("num_key_value_heads") is None
        else config_int(config, "num_key_value_heads")
    )
    if config.get("head_dim") is None:
        head_dim = config_int(config, "hidden_size") // attention_heads
        if head_dim == 0:
            raise CannotTell("hidden_size of the config is below num_attention_heads")
    else:
        head_dim = config_int(config, "head_dim")
    return heads, head_dim


def _attention(config: Config, layers: int, bits: int, kind: str, window_key: str | None) -> KvPart:
    heads, head_dim = kv_heads(config)
    window = None if window_key is None else config_int(config, window_key)
    kept = "" if window is None else f", the last {window:,} tokens at most"
    return KvPart(
        kind,
        layers,
        layers * _bytes(2 * heads * head_dim, bits),
        window,
        0,
        f"{layers} layers x 2 x {heads} KV heads x {head_dim} x {bits} bits{kept}",
    )


def _latent(config: Config, layers: int, bits: int) -> KvPart:
    elements = config_int(config, "kv_lora_rank") + config_int(config, "qk_rope_head_dim")
    explanation = (
        f"{layers} layers x {elements} latent elements x {bits} bits (not divided by tensor parallel)"
    )
    return KvPart("latent", layers, layers * _bytes(elements, bits), None, 0, explanation)


def _delta(config: Config, layers: int, bits: int) -> KvPart:
    del bits  # states keep their own types
    key_heads, key_dim = config_int(config, "linear_num_key_heads"), config_int(config, "linear_key_head_dim")
    value_heads, value_dim = (
        config_int(config, "linear_num_value_heads"),
        config_int(config, "linear_value_head_dim"),
    )
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    convolution = (config_int(config, "linear_conv_kernel_dim") - 1) * channels
    state = value_heads * value_dim * key_dim
    return KvPart(
        "state",
        layers,
        0,
        None,
        layers * (convolution * _STATE_BYTES + state * _DELTA_STATE_BYTES),
        f"{layers} linear-attention layers x ({state:,} fp32 + {convolution:,} 16-bit elements)",
    )


def _mamba(config: Config, layers: int, bits: int) -> KvPart:
    del bits  # states keep their own types
    inner = config_int(config, "mamba_expand") * config_int(config, "hidden_size")
    elements = inner * (config_int(config, "mamba_d_state") + config_int(config, "mamba_d_conv") - 1)
    explanation = f"{layers} Mamba layers x {elements:,} 16-bit elements"
    return KvPart("state", layers, 0, None, layers * elements * _STATE_BYTES, explanation)


def _bytes(elements: int, bits: int) -> int:
    return -(-elements * bits // 8)


_PART: dict[str, Callable[[Config, int, int], KvPart]] = {
    "full": lambda config, layers, bits: _attention(config, layers, bits, "full", None),
    "sliding": lambda config, layers, bits: _attention(config, layers, bits, "sliding", "sliding_window"),
    "chunked": lambda config, layers, bits: _attention(
        config, layers, bits, "chunked", "attention_chunk_size"
    ),
    "latent": _latent,
    "delta": _delta,
    "mamba": _mamba,
}
