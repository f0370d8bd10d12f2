"""Arithmetic of attention from a config.json, and the caches of a twin with full attention everywhere.

Counted as multiplications and additions of the scores and of the weighted values, softmax left out; a query
sees what its mask lets it see. Layer kinds are those of ``kv_architectures``. Latent attention decodes in the
latent space (DeepSeek-V2, arXiv 2405.04434, section 2.1: absorbed projections) and reads prompts with whole
heads. The gated delta rule (arXiv 2412.06464, equation 10) and Mamba (arXiv 2312.00752, algorithm 2) are
counted token by token, whatever the number of tokens before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressor.planner.kv_architectures import CannotTell, Config, config_int, layer_kinds
from compressor.planner.kv_bytes import KvLayer, known_config, kv_heads, kv_layers

_WINDOWS = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
# Of a state's element: decay, read with the key, written, read with the query: 1 + 2 + 2 + 2.
_DELTA_OPERATIONS = 7
# Discretized twice (2), decayed and added to (3), read (2).
_MAMBA_OPERATIONS = 7
_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer computes for a token beside its products with weights.

    Attributes:
        kind: as of ``KvPart``.
        pair_flops: of one query, all heads, for each token that it sees, while tokens are written.
        prompt_pair_flops: the same while a prompt is read.
        token_flops: of a state, for each token.
        window: tokens of the window or chunk, or None.
    """

    kind: str
    pair_flops: int
    prompt_pair_flops: int
    token_flops: int = 0
    window: int | None = None

    def written(self, tokens: int) -> int:
        """Operations for one token written behind ``tokens`` others, whose caches are as full as they get."""
        seen = tokens if self.window is None else min(tokens, self.window)
        return self.pair_flops * seen + self.token_flops

    def read(self, tokens: int) -> int:
        """Operations for a prompt of ``tokens`` tokens."""
        return self.prompt_pair_flops * self.pairs(tokens) + self.token_flops * tokens

    def pairs(self, tokens: int) -> int:
        """How many (query, key) pairs the mask of a prompt holds."""
        if self.window is None or tokens <= self.window:
            return tokens * (tokens + 1) // 2
        whole = self.window * (self.window + 1) // 2
        if self.kind == "sliding":
            return whole + (tokens - self.window) * self.window
        chunks, rest = divmod(tokens, self.window)
        return chunks * whole + rest * (rest + 1) // 2


def attention_layers(config: dict[str, Any]) -> tuple[tuple[AttentionLayer, ...], str]:
    """Every layer of the model, those without a cache of their own too; none and a reason where unknown."""
    try:
        text, architecture = known_config(config)
        kinds = layer_kinds(text, architecture)
        made = {kind: _LAYER.get(kind, _attention)(text, kind) for kind in set(kinds)}
    except CannotTell as cannot:
        return (), str(cannot)
    return tuple(made[kind] for kind in kinds), ""


def full_layers(config: dict[str, Any]) -> tuple[tuple[AttentionLayer, ...], tuple[KvLayer, ...]]:
    """The twin with full attention in every layer, of the same heads: its work, and its cache in 16 bit.

    Latent layers see everything already, and stay.

    Raises:
        CannotTell: the config does not say how large its heads are.
    """
    text, _ = known_config(config)
    work, _ = attention_layers(config)
    cached, _ = kv_layers(config)
    if all(layer.window is None and layer.kind != "state" for layer in cached):
        return work, cached
    heads, width = kv_heads(text)
    full = _attention(text, "full")
    token = 2 * heads * width * _ELEMENT_BYTES
    twin = tuple(
        replace(layer, kind="full", heads=heads, head_dim=width, window=None, bytes_16bit=token)
        if layer.window is not None or layer.kind == "state"
        else layer
        for layer in cached
    )
    return tuple(layer if layer.kind == "latent" else full for layer in work), twin


def written_flops(layers: Sequence[AttentionLayer], tokens: int) -> int:
    """Of all layers, for one token behind ``tokens`` others."""
    return sum(layer.written(tokens) for layer in layers)


def prompt_flops(layers: Sequence[AttentionLayer], tokens: int) -> int:
    """Of all layers, for a prompt."""
    return sum(layer.read(tokens) for layer in layers)


def _attention(config: Config, kind: str) -> AttentionLayer:
    """Scores and values: two operations for each element of a query and of its output, and token seen."""
    _, width = kv_heads(config)
    pair = 2 * config_int(config, "num_attention_heads") * 2 * width
    window = config_int(config, _WINDOWS[kind]) if kind in _WINDOWS else None
    return AttentionLayer(kind, pair, pair, window=window)


def _latent(config: Config, kind: str) -> AttentionLayer:
    heads, rank = config_int(config, "num_attention_heads"), config_int(config, "kv_lora_rank")
    rope = config_int(config, "qk_rope_head_dim")
    plain, value = config_int(config, "qk_nope_head_dim"), config_int(config, "v_head_dim")
    return AttentionLayer(kind, 2 * heads * (rank + rope + rank), 2 * heads * (plain + rope + value))


def _delta(config: Config, kind: str) -> AttentionLayer:
    del kind
    values, key, value = (
        config_int(config, name)
        for name in ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    )
    channels = 2 * config_int(config, "linear_num_key_heads") * key + values * value
    convolution = 2 * config_int(config, "linear_conv_kernel_dim") * channels
    return AttentionLayer("state", 0, 0, _DELTA_OPERATIONS * values * key * value + convolution)


def _mamba(config: Config, kind: str) -> AttentionLayer:
    del kind
    inner = config_int(config, "mamba_expand") * config_int(config, "hidden_size")
    convolution = 2 * config_int(config, "mamba_d_conv") * inner
    state = _MAMBA_OPERATIONS * inner * config_int(config, "mamba_d_state")
    return AttentionLayer("state", 0, 0, state + convolution)


_LAYER: dict[str, Callable[[Config, str], AttentionLayer]] = {
    "latent": _latent,
    "delta": _delta,
    "mamba": _mamba,
}
