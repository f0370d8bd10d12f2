"""Bytes of the attention cache and the recurrent states of one sequence, from a config.json alone.

Counted for one sequence on one device, without an engine's block rounding. Layer kinds and the defaults of
missing keys follow the configuration classes of transformers 5.17 (models/*/configuration_*.py); caches of
multi-head latent attention and recurrent states follow vLLM 0.32 (mamba_utils.py, mla_attention.py).
An architecture that is not listed gives a reason, never a guess.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from compressor.model.families import text_config

Config = Mapping[str, Any]

_STATE_BYTES = 2  # convolution states, and Mamba's, are kept in the model's 16-bit type
_DELTA_STATE_BYTES = 4  # the gated delta rule accumulates in fp32
_MAX_LAYERS = 10_000  # a config with more is not a model
_MAX_NUMBER = 2**53  # nor is one with larger numbers: floats hold these exactly
_SHOWN = 40  # characters of a value in a reason


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


class _CannotTell(Exception):
    """Carries the reason."""


def kv_bytes(config: dict[str, Any], tokens: int, *, bits: int = 16) -> tuple[KvBytes | None, str]:
    """Cache bytes of one sequence; None and a reason where the config does not tell them.

    Args:
        config: contents of config.json; a nested ``text_config`` is found.
        tokens: length of the sequence.
        bits: bits per stored key or value element (scales not counted); recurrent states keep theirs.
    """
    assert tokens >= 0
    assert bits > 0
    text = text_config(config)
    model_type = str(text.get("model_type") or f"{config.get('model_type')}_text")
    architecture = _ARCHITECTURES.get(model_type) or _ARCHITECTURES.get(f"{model_type}_text")
    if architecture is None:
        return None, f"how the cache of model_type {_shown(model_type)} is laid out is not known"
    try:
        parts = _parts({**architecture.defaults, **text}, architecture, bits)
    except _CannotTell as cannot:
        return None, str(cannot)
    known = KvBytes(
        tokens=tokens,
        total_bytes=sum(part.at(tokens) for part in parts),
        per_token_bytes=sum(part.token_bytes for part in parts if part.window is None),
        state_bytes=sum(part.state_bytes for part in parts),
        parts=tuple(parts),
    )
    return known, ""


def full_context(config: dict[str, Any]) -> int | None:
    """``max_position_embeddings`` of the language model, in tokens, or None where the config has none."""
    found = text_config(config).get("max_position_embeddings")
    return found if _is_int(found, least=1) else None


def _is_int(found: object, *, least: int) -> TypeGuard[int]:
    """Whether a value of the config is an integer of sane size; ``true`` is none."""
    return type(found) is int and least <= found < _MAX_NUMBER


def _int(config: Config, key: str, *, least: int = 1) -> int:
    """An integer of the config, at least ``least``."""
    found = config.get(key)
    if not _is_int(found, least=least):
        wanted = "a positive number" if least else "a number"
        raise _CannotTell(f"{key} of the config is {_shown(found)}, not {wanted}")
    return found


def _shown(found: object) -> str:
    text = repr(found)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _parts(config: Config, architecture: _Architecture, bits: int) -> list[KvPart]:
    """The parts of a config whose missing keys were filled in."""
    kinds = _layer_kinds(config, architecture)
    stated = config.get("num_kv_shared_layers")
    shared = 0 if stated is None else _int(config, "num_kv_shared_layers", least=0)
    if 0 < shared < len(kinds):
        kinds = kinds[:-shared]
    return [_PART[kind](config, layers, bits) for kind, layers in Counter(kinds).items()]


def _layer_kinds(config: Config, architecture: _Architecture) -> list[str]:
    """Kind of every layer: ``layer_types`` where the config has them, else the architecture's own rule."""
    count = _int(config, "num_hidden_layers")
    if count > _MAX_LAYERS:
        raise _CannotTell(f"num_hidden_layers of the config is {count}, more than {_MAX_LAYERS}")
    types = config.get("layer_types")
    if types is None:
        return architecture.kinds(config, count)
    if not isinstance(types, list) or len(types) != count:
        raise _CannotTell(f"layer_types of the config do not list its {count} layers")
    known = {
        "full_attention": architecture.full,
        "sliding_attention": "sliding",
        "chunked_attention": "chunked",
        "linear_attention": architecture.recurrent,
    }
    kinds = [known.get(str(found), "") for found in types]
    if not all(kinds):
        raise _CannotTell(
            f"layer_types of the config have {_shown(types[kinds.index('')])}, whose cache is not known"
        )
    return kinds


# --- parts: bytes of the layers of one kind ---


def _attention(config: Config, layers: int, bits: int, kind: str, window_key: str | None) -> KvPart:
    attention_heads = _int(config, "num_attention_heads")
    heads = (
        attention_heads if config.get("num_key_value_heads") is None else _int(config, "num_key_value_heads")
    )
    if config.get("head_dim") is None:
        head_dim = _int(config, "hidden_size") // attention_heads
        if head_dim == 0:
            raise _CannotTell("hidden_size of the config is below num_attention_heads")
    else:
        head_dim = _int(config, "head_dim")
    window = None if window_key is None else _int(config, window_key)
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
    elements = _int(config, "kv_lora_rank") + _int(config, "qk_rope_head_dim")
    explanation = (
        f"{layers} layers x {elements} latent elements x {bits} bits (not divided by tensor parallel)"
    )
    return KvPart("latent", layers, layers * _bytes(elements, bits), None, 0, explanation)


def _delta(config: Config, layers: int, bits: int) -> KvPart:
    del bits  # states keep their own types
    key_heads, key_dim = _int(config, "linear_num_key_heads"), _int(config, "linear_key_head_dim")
    value_heads, value_dim = _int(config, "linear_num_value_heads"), _int(config, "linear_value_head_dim")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    convolution = (_int(config, "linear_conv_kernel_dim") - 1) * channels
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
    inner = _int(config, "mamba_expand") * _int(config, "hidden_size")
    elements = inner * (_int(config, "mamba_d_state") + _int(config, "mamba_d_conv") - 1)
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


# --- architectures: kind of each layer where the config does not list them, and defaults of its keys ---


@dataclass(frozen=True, slots=True)
class _Architecture:
    kinds: Callable[[Config, int], list[str]]
    defaults: Config
    full: str = "full"  # what a layer of type full_attention keeps
    recurrent: str = ""  # what a layer of type linear_attention keeps; "" where the model has none


def _all(kind: str) -> Callable[[Config, int], list[str]]:
    return lambda _config, count: [kind] * count


def _window_if_set(config: Config, count: int) -> list[str]:
    return ["full" if config.get("sliding_window") is None else "sliding"] * count


def _window_above(config: Config, count: int) -> list[str]:
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return ["full"] * count
    first = _int(config, "max_window_layers", least=0)
    return ["sliding" if layer >= first else "full" for layer in range(count)]


def _full_unless_windowed(config: Config, count: int) -> list[str]:
    if config.get("use_sliding_window"):
        raise _CannotTell("use_sliding_window is set and layer_types do not say for which layers")
    return ["full"] * count


def _full_every(key: str, other: str) -> Callable[[Config, int], list[str]]:
    """Full attention in every n-th layer, n = ``config[key]``; the other layers are ``other``."""

    def kinds(config: Config, count: int) -> list[str]:
        every = _int(config, key)
        return ["full" if (layer + 1) % every == 0 else other for layer in range(count)]

    return kinds


def _llama4(config: Config, count: int) -> list[str]:
    with_rope = config.get("no_rope_layers")
    if not with_rope:
        return _full_every("no_rope_layer_interval", "chunked")(config, count)
    if not isinstance(with_rope, list) or len(with_rope) != count:
        raise _CannotTell(f"no_rope_layers of the config do not list its {count} layers")
    return ["chunked" if rope else "full" for rope in with_rope]


def _jamba(config: Config, count: int) -> list[str]:
    period, offset = _int(config, "attn_layer_period"), _int(config, "attn_layer_offset", least=0)
    return ["full" if layer % period == offset else "mamba" for layer in range(count)]


def _dims(
    layers: int, hidden: int, heads: int, kv_heads: int | None, head_dim: int | None = None
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}
_NEXT = _full_every("full_attention_interval", "delta")
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
# Only Gemma 3 has this key in its config; for the others it stands for what their code fixes.
_EVERY = "sliding_window_pattern"

_ARCHITECTURES: dict[str, _Architecture] = {
    "llama": _Architecture(_all("full"), _dims(32, 4096, 32, None)),
    "granite": _Architecture(_all("full"), _dims(32, 4096, 32, None)),
    "olmo2": _Architecture(_all("full"), _dims(32, 4096, 32, None)),
    "gemma": _Architecture(_all("full"), _dims(28, 3072, 16, 16, 256)),
    "glm4_moe": _Architecture(_all("full"), _dims(46, 4096, 96, 8)),
    "mistral": _Architecture(_window_if_set, {**_dims(32, 4096, 32, 8), "sliding_window": 4096}),
    "ministral": _Architecture(_window_if_set, {**_dims(32, 4096, 32, 8), "sliding_window": 4096}),
    "mixtral": _Architecture(_window_if_set, _dims(32, 4096, 32, 8)),
    "phi3": _Architecture(_window_if_set, _dims(32, 3072, 32, None)),
    "qwen2": _Architecture(_window_above, {**_dims(32, 4096, 32, 32), **_QWEN_WINDOW}),
    "qwen3": _Architecture(_window_above, {**_dims(32, 4096, 32, 32, 128), **_QWEN_WINDOW}),
    "qwen2_moe": _Architecture(_full_unless_windowed, _dims(24, 2048, 16, 16)),
    "qwen3_moe": _Architecture(_full_unless_windowed, _dims(24, 2048, 32, 4)),
    "smollm3": _Architecture(_full_unless_windowed, _dims(36, 2048, 16, 4)),
    "gemma2": _Architecture(
        _full_every(_EVERY, "sliding"), {**_dims(26, 2304, 8, 4, 256), "sliding_window": 4096, _EVERY: 2}
    ),
    "gemma3_text": _Architecture(
        _full_every(_EVERY, "sliding"), {**_dims(26, 2304, 8, 4, 256), "sliding_window": 4096, _EVERY: 6}
    ),
    "gemma3n_text": _Architecture(
        _full_every(_EVERY, "sliding"),
        {**_dims(35, 2048, 8, 2, 256), "sliding_window": 512, _EVERY: 5, "num_kv_shared_layers": 15},
    ),
    "gpt_oss": _Architecture(
        _full_every(_EVERY, "sliding"), {**_dims(36, 2880, 64, 8, 64), "sliding_window": 128, _EVERY: 2}
    ),
    "llama4_text": _Architecture(
        _llama4, {**_dims(48, 5120, 40, 8, 128), "attention_chunk_size": 8192, "no_rope_layer_interval": 4}
    ),
    "deepseek_v2": _Architecture(_all("latent"), {**_dims(32, 4096, 32, None), **_LATENT}, full="latent"),
    "deepseek_v3": _Architecture(_all("latent"), {**_dims(61, 7168, 128, 128), **_LATENT}, full="latent"),
    "qwen3_next": _Architecture(_NEXT, {**_dims(48, 2048, 16, 2, 256), **_DELTA}, recurrent="delta"),
    "qwen3_5_moe_text": _Architecture(_NEXT, {**_dims(40, 2048, 16, 2, 256), **_DELTA}, recurrent="delta"),
    "qwen3_5_text": _Architecture(_NEXT, {**_dims(32, 4096, 16, 4, 256), **_DELTA}, recurrent="delta"),
    "jamba": _Architecture(
        _jamba,
        {
            **_dims(32, 4096, 32, 8),
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
        },
        recurrent="mamba",
    ),
}
