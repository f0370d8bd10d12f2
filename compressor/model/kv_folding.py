"""What can be folded into the weights around attention, so that keys and values are easier to store.

Values: the rows of v_proj are rotated head by head by a Hadamard matrix over its root, and the columns of
o_proj alike, whose product is then the same (QuaRot, arXiv:2404.00456, section 4). Keys: both coordinates of
a pair that RoPE turns are multiplied by one factor, and the queries' divided by it, which RoPE passes through
(QServe, arXiv:2405.04532, section 4.2). Where a family normalises queries and keys before RoPE, the factors
go into the weights of these norms, which all heads share.

Where families differ follows transformers 5.17 (models/*/modeling_*.py). No torch here: plans need it.

Legend: D head_dim.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from compressor.model.families.naming import common_role, text_config
from compressor.spec import TensorHeader

Part = Literal["value", "output", "key", "query"]
_ATTENTION = re.compile(
    r"(?:.*\.)?layers\.(?P<index>\d+)\.self_attn\.(?P<leaf>[a-z_]+\.(?:weight|bias))$", re.ASCII
)
# By model_type: what the norms of queries and keys add to their weights; None where there are none.
_NORMS: Mapping[str, float | None] = {
    **dict.fromkeys(["llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "gemma", "gemma2"]),
    **dict.fromkeys(["granite", "smollm3", "gpt_oss", "phi3", "jamba", "llama4_text"]),
    **dict.fromkeys(["qwen3", "qwen3_moe", "olmo2"], 0.0),
    **dict.fromkeys(["gemma3_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"], 1.0),
}
_GATED = "attention's output is multiplied by a gate before o_proj, which a rotation does not pass"
_GATES = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
_TURNED_OTHERWISE = (
    "RoPE turns neighbouring coordinates, or keys are normalised after it, which undoes factors"
)
_NO_ROPE = frozenset({"jamba"})


@dataclass(frozen=True)
class Spot:
    """Rows of a tensor (of an output projection: columns) that a fold changes.

    Attributes:
        tensor: its name.
        part: what the rows are.
        layer: index of the layer.
        start: the first row.
        heads: runs of D rows; of a norm that all heads share, 1.
        offset: what is added to the tensor before it multiplies.
    """

    tensor: str
    part: Part
    layer: int
    start: int
    heads: int
    offset: float = 0.0


@dataclass(frozen=True)
class Foldable:
    """What a model lets be folded.

    Attributes:
        head_dim: D.
        key_heads: sets of key factors of a layer: one for each KV head, or one where heads share a norm.
        rotary_dim: coordinates of a key that RoPE turns: ``i`` with ``i + rotary_dim / 2``.
        values: layers whose values can be rotated.
        keys: layers whose keys can be scaled.
        no_values: why values of no layer can be; "" where some can.
        no_keys: the same for keys.
    """

    head_dim: int = 0
    key_heads: int = 0
    rotary_dim: int = 0
    values: Mapping[int, tuple[Spot, ...]] = field(default_factory=dict)
    keys: Mapping[int, tuple[Spot, ...]] = field(default_factory=dict)
    no_values: str = ""
    no_keys: str = ""


@dataclass(frozen=True)
class _Sizes:
    heads: int
    kv_heads: int
    head_dim: int


def foldable(headers: Mapping[str, TensorHeader], config: dict[str, Any]) -> Foldable:
    """What the tensors of a source let be folded, with reasons where that is nothing."""
    text = text_config(config)
    model_type = str(text.get("model_type") or f"{config.get('model_type')}_text")
    if text.get("kv_lora_rank") is not None:
        return _nothing("latent attention (MLA) has no keys and values of its own to fold into")
    if model_type not in _NORMS and model_type.removesuffix("_text") in _NORMS:
        model_type = model_type.removesuffix("_text")
    if model_type not in _NORMS:
        return _nothing(f"how attention of {model_type[:40]!r} uses its keys and values is not known")
    sizes = _sizes(text)
    if sizes is None:
        return _nothing("the config does not tell its attention heads")
    values, keys = {}, {}
    shared = False
    for layer, tensors in _layers(headers, config).items():
        values[layer] = _values(tensors, layer, sizes)
        keys[layer], shared = _keys(tensors, layer, sizes, _NORMS[model_type])
    otherwise = [layer for layer in keys if _turned_otherwise(text, model_type, layer)]
    no_keys = _TURNED_OTHERWISE if otherwise and len(otherwise) == len(keys) else ""
    if any(not spots for spots in [*values.values(), *keys.values()]) or not values:
        return _nothing("its attention tensors have not the names and shapes of its family")
    return Foldable(
        sizes.head_dim,
        1 if shared else sizes.kv_heads,
        _rotary_dim(text, model_type, sizes.head_dim),
        {} if _no_values(model_type, sizes) else values,
        {layer: spots for layer, spots in keys.items() if layer not in otherwise},
        _no_values(model_type, sizes),
        no_keys,
    )


def attention_modules(headers: Mapping[str, TensorHeader], config: dict[str, Any]) -> dict[int, str]:
    """Layer -> its attention module, towers and draft layers left out."""
    return {
        layer: tensors["o_proj.weight"].name.removesuffix(".o_proj.weight")
        for layer, tensors in _layers(headers, config).items()
    }


def _nothing(reason: str) -> Foldable:
    return Foldable(no_values=reason, no_keys=reason)


def _no_values(model_type: str, sizes: _Sizes) -> str:
    if model_type in _GATES:
        return _GATED
    if sizes.head_dim & (sizes.head_dim - 1):
        return f"head_dim {sizes.head_dim} is no power of two, and a Hadamard rotation needs one"
    return ""


def _sizes(text: Mapping[str, Any]) -> _Sizes | None:
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    kv_heads, head_dim = text.get("num_key_value_heads"), text.get("head_dim")
    kv_heads = heads if kv_heads is None else kv_heads
    if type(heads) is not int or type(kv_heads) is not int or min(heads, kv_heads) < 1:
        return None
    if head_dim is None and type(hidden) is int:
        head_dim = hidden // heads
    if type(head_dim) is not int or head_dim < 2 or heads % kv_heads:
        return None
    return _Sizes(heads, kv_heads, head_dim)


def _rotary_dim(text: Mapping[str, Any], model_type: str, head_dim: int) -> int:
    if model_type in _NO_ROPE:
        return 0
    rope = text.get("rope_parameters")
    found = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    factor = text.get("partial_rotary_factor") if found is None else found
    if not isinstance(factor, int | float) or not 0 < factor <= 1:
        factor = 0.25 if model_type in _GATES else 1.0
    return int(head_dim * factor)


def _turned_otherwise(text: Mapping[str, Any], model_type: str, layer: int) -> bool:
    """Llama 4: RoPE turns coordinates 2i and 2i + 1; with ``use_qk_norm`` keys are normalised afterwards."""
    if model_type != "llama4_text":
        return False
    with_rope = text.get("no_rope_layers")
    if isinstance(with_rope, list) and layer < len(with_rope):
        return bool(with_rope[layer])
    every = text.get("no_rope_layer_interval")
    return (layer + 1) % (every if type(every) is int and every > 0 else 4) != 0


def _layers(
    headers: Mapping[str, TensorHeader], config: dict[str, Any]
) -> dict[int, dict[str, TensorHeader]]:
    """Layer -> leaf -> tensor of attention; towers and draft layers left out."""
    found: dict[int, dict[str, TensorHeader]] = defaultdict(dict)
    for name, header in headers.items():
        match = _ATTENTION.match(name)
        if match is None or match["leaf"].startswith("rotary"):
            continue
        weight = TensorHeader(f"{name.rpartition('.')[0]}.weight", "BF16", (1, 1))
        role = common_role(weight, config)
        if role is None:
            found[int(match["index"])][match["leaf"]] = header
    return {layer: tensors for layer, tensors in found.items() if "o_proj.weight" in tensors}


def _values(tensors: Mapping[str, TensorHeader], layer: int, sizes: _Sizes) -> tuple[Spot, ...]:
    """The spots of a rotation; none where names or shapes are others."""
    output = tensors["o_proj.weight"]
    if output.shape[1:] != (sizes.heads * sizes.head_dim,):
        return ()
    made = _rows(tensors, layer, sizes, "value", "v_proj", sizes.heads + sizes.kv_heads)
    return (*made, Spot(output.name, "output", layer, 0, sizes.heads)) if made else ()


def _keys(
    tensors: Mapping[str, TensorHeader], layer: int, sizes: _Sizes, offset: float | None
) -> tuple[tuple[Spot, ...], bool]:
    """The spots of factors, and whether all heads share one set of them."""
    if offset is None:
        keys = _rows(tensors, layer, sizes, "key", "k_proj", sizes.heads)
        queries = _rows(tensors, layer, sizes, "query", "q_proj", 0)
        return ((*keys, *queries) if keys and queries else ()), False
    found: list[Spot] = []
    shared = False
    parts: Sequence[tuple[Part, str, int]] = (
        ("key", "k_norm.weight", sizes.kv_heads),
        ("query", "q_norm.weight", sizes.heads),
    )
    for part, leaf, heads in parts:
        header = tensors.get(leaf)
        if header is None or header.shape not in ((sizes.head_dim,), (heads * sizes.head_dim,)):
            return (), False
        shared = header.shape == (sizes.head_dim,)
        found.append(Spot(header.name, part, layer, 0, 1 if shared else heads, offset))
    return tuple(found), shared


def _rows(
    tensors: Mapping[str, TensorHeader], layer: int, sizes: _Sizes, part: Part, leaf: str, before: int
) -> tuple[Spot, ...]:
    """Spots of a projection's weight and bias, alone or in ``qkv_proj`` behind ``before`` heads."""
    heads = sizes.heads if part == "query" else sizes.kv_heads
    every = sizes.heads + 2 * sizes.kv_heads
    found = []
    for kind in ("weight", "bias"):
        alone, fused = tensors.get(f"{leaf}.{kind}"), tensors.get(f"qkv_proj.{kind}")
        header, start, rows = (alone, 0, heads) if alone is not None else (fused, before, every)
        if header is None:
            if kind == "weight":
                return ()
            continue
        if header.shape[:1] != (rows * sizes.head_dim,):
            return ()
        found.append(Spot(header.name, part, layer, start * sizes.head_dim, heads))
    return tuple(found)
