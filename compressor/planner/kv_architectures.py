"""How the cache of each architecture is laid out, from a config.json alone: the kind of every layer.

Layer kinds and the defaults of missing keys follow the configuration classes of transformers 5.17
(models/*/configuration_*.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

Config = Mapping[str, Any]

_MAX_LAYERS = 10_000  # a config with more is not a model
_MAX_NUMBER = 2**53  # nor is one with larger numbers: floats hold these exactly
_SHOWN = 40  # characters of a value in a reason


class CannotTell(Exception):
    """Carries the reason."""


def is_int(found: object, *, least: int) -> TypeGuard[int]:
    """Whether a value of the config is an integer of sane size; ``true`` is none."""
    return type(found) is int and least <= found < _MAX_NUMBER


def config_int(config: Config, key: str, *, least: int = 1) -> int:
    """An integer of the config, at least ``least``."""
    found = config.get(key)
    if not is_int(found, least=least):
        wanted = "a positive number" if least else "a number"
        raise CannotTell(f"{key} of the config is {shown(found)}, not {wanted}")
    return found


def shown(found: object) -> str:
    """A value as a reason quotes it: its ``repr``, shortened."""
    text = repr(found)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def layer_kinds(config: Config, architecture: Architecture) -> list[str]:
    """Kind of every layer: ``layer_types`` where the config has them, else the architecture's own rule."""
    count = config_int(config, "num_hidden_layers")
    if count > _MAX_LAYERS:
        raise CannotTell(f"num_hidden_layers of the config is {count}, more than {_MAX_LAYERS}")
    types = config.get("layer_types")
    if types is None:
        return architecture.kinds(config, count)
    if not isinstance(types, list) or len(types) != count:
        raise CannotTell(f"layer_types of the config do not list its {count} layers")
    known = {
        "full_attention": architecture.full,
        "sliding_attention": "sliding",
        "chunked_attention": "chunked",
        "linear_attention": architecture.recurrent,
    }
    kinds = [known.get(str(found), "") for found in types]
    if not all(kinds):
        raise CannotTell(
            f"layer_types of the config have {shown(types[kinds.index('')])}, whose cache is not known"
        )
    return kinds


# --- architectures: kind of each layer where the config does not list them, and defaults of its keys ---


@dataclass(frozen=True, slots=True)
class Architecture:
    """The rules of one ``model_type``.

    Attributes:
        kinds: (config, number of layers) -> kind of every layer, where ``layer_types`` do not list them.
        defaults: what transformers puts in the place of missing keys.
        full: what a layer of type ``full_attention`` keeps.
        recurrent: what a layer of type ``linear_attention`` keeps; "" where the model has none.
    """

    kinds: Callable[[Config, int], list[str]]
    defaults: Config
    full: str = "full"
    recurrent: str = ""


def _all(kind: str) -> Callable[[Config, int], list[str]]:
    return lambda _config, count: [kind] * count


def _window_if_set(config: Config, count: int) -> list[str]:
    return ["full" if config.get("sliding_window") is None else "sliding"] * count


def _window_above(config: Config, count: int) -> list[str]:
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return ["full"] * count
    first = config_int(config, "max_window_layers", least=0)
    return ["sliding" if layer >= first else "full" for layer in range(count)]


def _full_unless_windowed(config: Config, count: int) -> list[str]:
    if config.get("use_sliding_window"):
        raise CannotTell("use_sliding_window is set and layer_types do not say for which layers")
    return ["full"] * count


def _full_every(key: str, other: str) -> Callable[[Config, int], list[str]]:
    """Full attention in every n-th layer, n = ``config[key]``; the other layers are ``other``."""

    def kinds(config: Config, count: int) -> list[str]:
        every = config_int(config, key)
        return ["full" if (layer + 1) % every == 0 else other for layer in range(count)]

    return kinds


def _llama4(config: Config, count: int) -> list[str]:
    with_rope = config.get("no_rope_layers")
    if not with_rope:
        return _full_every("no_rope_layer_interval", "chunked")(config, count)
    if not isinstance(with_rope, list) or len(with_rope) != count:
        raise CannotTell(f"no_rope_layers of the config do not list its {count} layers")
    return ["chunked" if rope else "full" for rope in with_rope]


def _jamba(config: Config, count: int) -> list[str]:
    period, offset = config_int(config, "attn_layer_period"), config_int(config, "attn_layer_offset", least=0)
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
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
# Only Gemma 3 has this key in its config; for the others it stands for what their code fixes.
_EVERY = "sliding_window_pattern"

REFUSED = {
    "deepseek_v4": "DeepSeek-V4 keeps a cache that its compressors and sparse-attention indexers make; how "
    "large it is, and how it could be quantized, is not known"
}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_all("full"), _dims(32, 4096, 32, None)),
    "granite": Architecture(_all("full"), _dims(32, 4096, 32, None)),
    "olmo2": Architecture(_all("full"), _dims(32, 4096, 32, None)),
    "gemma": Architecture(_all("full"), _dims(28, 3072, 16, 16, 256)),
    "glm4_moe": Architecture(_all("full"), _dims(46, 4096, 96, 8)),
    "mistral": Architecture(_window_if_set, {**_dims(32, 4096, 32, 8), "sliding_window": 4096}),
    "ministral": Architecture(_window_if_set, {**_dims(32, 4096, 32, 8), "sliding_window": 4096}),
    "mixtral": Architecture(_window_if_set, _dims(32, 4096, 32, 8)),
    "phi3": Architecture(_window_if_set, _dims(32, 3072, 32, None)),
    "qwen2": Architecture(_window_above, {**_dims(32, 4096, 32, 32), **_QWEN_WINDOW}),
    "qwen3": Architecture(_window_above, {**_dims(32, 4096, 32, 32, 128), **_QWEN_WINDOW}),
    "qwen2_moe": Architecture(_full_unless_windowed, _dims(24, 2048, 16, 16)),
    "qwen3_moe": Architecture(_full_unless_windowed, _dims(24, 2048, 32, 4)),
    "smollm3": Architecture(_full_unless_windowed, _dims(36, 2048, 16, 4)),
    "gemma2": Architecture(
        _full_every(_EVERY, "sliding"), {**_dims(26, 2304, 8, 4, 256), "sliding_window": 4096, _EVERY: 2}
    ),
    "gemma3_text": Architecture(
        _full_every(_EVERY, "sliding"), {**_dims(26, 2304, 8, 4, 256), "sliding_window": 4096, _EVERY: 6}
    ),
    "gemma3n_text": Architecture(
        _full_every(_EVERY, "sliding"),
        {**_dims(35, 2048, 8, 2, 256), "sliding_window": 512, _EVERY: 5, "num_kv_shared_layers": 15},
    ),
    "gpt_oss": Architecture(
        _full_every(_EVERY, "sliding"), {**_dims(36, 2880, 64, 8, 64), "sliding_window": 128, _EVERY: 2}
    ),
    "llama4_text": Architecture(
        _llama4, {**_dims(48, 5120, 40, 8, 128), "attention_chunk_size": 8192, "no_rope_layer_interval": 4}
    ),
    "deepseek_v2": Architecture(_all("latent"), {**_dims(32, 4096, 32, None), **_LATENT}, full="latent"),
    "deepseek_v3": Architecture(_all("latent"), {**_dims(61, 7168, 128, 128), **_LATENT}, full="latent"),
    "qwen3_next": Architecture(_NEXT, {**_dims(48, 2048, 16, 2, 256), **_DELTA}, recurrent="delta"),
    "qwen3_5_moe_text": Architecture(_NEXT, {**_dims(40, 2048, 16, 2, 256), **_DELTA}, recurrent="delta"),
    "qwen3_5_text": Architecture(_NEXT, {**_dims(32, 4096, 16, 4, 256), **_DELTA}, recurrent="delta"),
    "jamba": Architecture(
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
