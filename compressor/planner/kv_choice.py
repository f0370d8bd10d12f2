"""Formats of the KV cache against a model: which layers can have one, what that takes, how vLLM is told.

Full attention gets the format; sliding windows and chunks stay in 16 bit, since they stop growing; states are
no cache. vLLM 0.32 keeps both ends of a dense model in 16 bit, whatever it is told
(``quantization/turboquant/config.py`` ``get_boundary_skip_layers``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.kv.base import KvFormat
from compressor.kv.formats import FORMATS
from compressor.planner.kv_bytes import KvLayer, full_context, kv_layers, layer_count
from compressor.planner.kv_pages import PagedLayer, paged_bytes

BF16 = "bf16"
# Kinds of layers that hold keys and values; the first grows with every token.
_CACHED = ("full", "sliding", "chunked")
# What vLLM 0.32's backends for latent attention can store (v1/attention/backends/mla/flashmla.py).
_LATENT_FORMATS = (BF16, "fp8")
_DEFAULT_CONTEXTS = (8192, 32768, 131072)
_DEFAULT_USERS = (1, 8)
DTYPE_NAMES = {BF16: "auto"}


@dataclass(frozen=True)
class KvSize:
    """GiB are these bytes / 2**30: the cache of ``users`` sequences of ``context`` tokens each."""

    context: int
    users: int
    bytes: int


@dataclass(frozen=True)
class KvOption:
    """One format for a model.

    Attributes:
        format: its name.
        tier: who serves it.
        bytes_per_token: what a further token of a long sequence adds, all layers and heads, as stored.
        layers: how many layers have the format.
        kept: indices of full-attention layers that stay in 16 bit.
        sizes: for each context, and for the longest with each number of users; for formats that vLLM serves,
            with its blocks and pages. Empty where ``problem`` is not.
        problem: why the model cannot have it; "" where it can.
        chosen: whether the recipe asks for it.
    """

    format: str
    tier: str
    bytes_per_token: int
    layers: int
    kept: tuple[int, ...]
    sizes: tuple[KvSize, ...]
    problem: str
    chosen: bool


def kv_options(
    config: dict[str, Any],
    *,
    chosen: str | None = None,
    contexts: Sequence[int] = (),
    users: Sequence[int] = (),
) -> tuple[tuple[KvOption, ...], str]:
    """Every format for the model of a config; none and a reason where its cache is not known.

    Args:
        config: contents of config.json.
        chosen: the recipe's format, or None.
        contexts: tokens of a sequence; by default some up to the model's own.
        users: sequences at once; by default one and eight.
    """
    layers, reason = kv_layers(config)
    if not layers:
        return (), reason or "no layer of the model has a cache"
    points = kv_points(config, contexts, users)
    return tuple(_option(layers, config, form, points, form.name == chosen) for form in FORMATS.values()), ""


def no_smaller(options: Sequence[KvOption]) -> list[str]:
    """Formats whose bytes in vLLM are no fewer than those of 16 bit, though a token's are."""
    plain = next((option for option in options if option.format == BF16 and not option.problem), None)
    if plain is None:
        return []
    return [
        option.format
        for option in options
        if option.sizes and option.layers and option.sizes[-1].bytes >= plain.sizes[-1].bytes
    ]


def kv_points(config: dict[str, Any], contexts: Sequence[int], users: Sequence[int]) -> list[tuple[int, int]]:
    """(tokens, sequences) that the cache is counted for: one of each length, several of the longest."""
    contexts = contexts or _contexts(full_context(config))
    several = [(max(contexts), count) for count in (users or _DEFAULT_USERS) if count > 1]
    return [*((context, 1) for context in contexts), *several]


def _contexts(longest: int | None) -> tuple[int, ...]:
    if longest is None:
        return _DEFAULT_CONTEXTS
    return tuple(sorted({min(context, longest) for context in (*_DEFAULT_CONTEXTS, longest)}))


def _option(
    layers: Sequence[KvLayer],
    config: dict[str, Any],
    form: KvFormat,
    points: Sequence[tuple[int, int]],
    chosen: bool,
) -> KvOption:
    problem = format_problem(layers, form)
    if problem:
        return KvOption(form.name, form.tier, 0, 0, (), (), problem, chosen)
    formats = format_map(layers, config, form)
    sizes = []
    for context, users in points:
        size = cache_bytes(layers, formats, context, engine=form.tier == "vllm")
        if size is None:
            problem = "vLLM 0.32 finds no common page size for its layers (AssertionError at start)"
            return KvOption(form.name, form.tier, 0, 0, (), (), problem, chosen)
        sizes.append(KvSize(context, users, users * size))
    growing = [layer for layer in layers if layer.kind in ("full", "latent")]
    kept = tuple(layer.index for layer in growing if layer.index not in formats)
    return KvOption(
        form.name,
        form.tier,
        sum(token_bytes(layer, formats) for layer in growing),
        len(formats),
        kept if form.name != BF16 else (),
        tuple(sizes),
        "",
        chosen,
    )


def format_problem(layers: Sequence[KvLayer], form: KvFormat) -> str:
    """Why none of these layers can be stored so, in words for the user; "" where those that grow can."""
    growing = [layer for layer in layers if layer.kind in ("full", "latent")]
    if form.name == BF16:
        return ""
    if any(layer.kind == "latent" for layer in growing):
        if form.name in _LATENT_FORMATS:
            return ""
        return f"latent attention (MLA) keeps one vector for all heads, which {form.name} does not store"
    if not growing:
        return "no layer has full attention: windows and states do not grow"
    return next((problem for layer in growing if (problem := form.problem(layer.head_dim))), "") or ""


def format_map(layers: Sequence[KvLayer], config: dict[str, Any], form: KvFormat) -> Mapping[int, KvFormat]:
    """Layer -> format of those that have it: full and latent attention, but for ends that vLLM keeps."""
    if form.name == BF16:
        return {}
    ends = forced_ends(layers, config, form)
    return {
        layer.index: form for layer in layers if layer.kind in ("full", "latent") and layer.index not in ends
    }


def forced_ends(layers: Sequence[KvLayer], config: dict[str, Any], form: KvFormat) -> frozenset[int]:
    """Indices that vLLM 0.32 keeps in 16 bit unasked; those of layers without full attention among them."""
    if any(layer.kind == "state" for layer in layers):
        return frozenset()
    count = layer_count(config)
    ends = min(form.skips_ends, count // 2)
    return frozenset([*range(ends), *range(count - ends, count)])


def cache_bytes(
    layers: Sequence[KvLayer], formats: Mapping[int, KvFormat], tokens: int, *, engine: bool
) -> int | None:
    """Bytes of one sequence: in vLLM's blocks where ``engine``, else to the byte, as our own cache has them.

    None where vLLM finds no common page size.
    """
    if engine:
        paged = [
            PagedLayer(
                layer.kind,
                token_bytes(layer, formats),
                0 if layer.kind == "state" else layer.bytes_16bit // 2,
                layer.index in formats,
                layer.window,
            )
            for layer in layers
        ]
        return paged_bytes(paged, tokens)
    total = 0
    for layer in layers:
        held = tokens if layer.window is None else min(tokens, layer.window)
        total += token_bytes(layer, formats) * (1 if layer.kind == "state" else held)
    return total


def token_bytes(layer: KvLayer, formats: Mapping[int, KvFormat]) -> int:
    """Bytes of one token in one layer; of a state, of one sequence."""
    form = formats.get(layer.index)
    if form is None:
        return layer.bytes_16bit
    if layer.kind == "latent":
        return form.key_bytes(layer.head_dim)
    return layer.heads * form.slot_bytes(layer.head_dim)


def launch_flags(layers: Sequence[KvLayer], config: dict[str, Any], formats: Mapping[int, KvFormat]) -> str:
    """The flags of ``vllm serve`` for one format and the layers that lack it; "" for 16 bit everywhere.

    Layers that vLLM keeps in 16 bit unasked are not named.
    """
    names = {form.name for form in formats.values()}
    assert len(names) <= 1, "vLLM 0.32 takes one format for all layers"
    if not names:
        return ""
    form = next(iter(formats.values()))
    unasked = forced_ends(layers, config, form)
    windows = any(layer.kind == "sliding" for layer in layers)
    kept = [
        str(layer.index)
        for layer in layers
        if layer.kind in ("full", "chunked", "latent")
        and layer.index not in formats
        and layer.index not in unasked
    ]
    skipped = [*kept, *(["sliding_window"] if windows else [])]
    flags = f"--kv-cache-dtype {DTYPE_NAMES.get(form.name, form.name)}"
    return f"{flags} --kv-cache-dtype-skip-layers {' '.join(skipped)}" if skipped else flags
