"""What checkpoint tensor names tell, whatever the architecture: towers, blocks, ends, fused neighbours."""

from __future__ import annotations

import re
from typing import Any

from compressor.spec import FLOAT_DTYPES, InputNorm, LinearPart, Role, TensorHeader

# Keys under which multimodal configs nest their language model.
TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")

EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embeddings"})
LM_HEADS = frozenset({"lm_head", "embed_out", "output"})

# Linear layers that vLLM 0.32 concatenates (packed_modules_mapping of its models): they share one
# tensor-level scale. Member -> name of the fused layer. w1/w3 are the gate and up of its fused experts.
# A checkpoint that stores a fused layer as such (Phi-3) has a group of one: the engine still splits it.
FUSED = {
    "qkv_proj": "qkv_proj",
    "gate_up_proj": "gate_up_proj",
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "w13",
    "w3": "w13",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
}

# vLLM 0.32 quant_utils.py get_and_maybe_dequant_weights multiplies the quantized layer by an identity.
FOLDED = "engines fold it into its neighbours, and read it through its input's quantization"

PREDICTION = "multi-token prediction layer"

_TOWER = re.compile(
    r"(^|[._])(vision|visual|vit|image|audio|speech|sound|multi_modal|multimodal|mm_projector|connector)([._]|$)"
)
_DRAFT = re.compile(r"(^|\.)(mtp|mtp_layers|mtp_block|nextn)\.")
_FED_BY_NORM = re.compile(
    r"(?P<layer>(?:.*\.)?layers\.\d+)\."
    r"(?:(?P<attention>self_attn\.(?:(?:q|k|v|qkv|q_a)_proj|kv_a_proj_with_mqa)|linear_attn\.in_proj_\w+)"
    r"|(?:mlp|feed_forward)\.(?:shared_experts?\.|experts\.(?:\d+\.)?)?(?:gate|up|gate_up)_proj"
    r"|block_sparse_moe\.experts\.\d+\.w[13])(?:\.weight)?$"
)
_BLOCK = re.compile(r"(?:^|\.)[A-Za-z_]\w*\.(\d+)\.")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json: a nested ``text_config`` (or its like), else all of it."""
    for key in TEXT_KEYS:
        nested = config.get(key)
        if isinstance(nested, dict):
            return text_config(nested)
    return config


def is_wrapper(config: dict[str, Any]) -> bool:
    """Whether the language model has towers beside it, whose config lies in or beside its own."""
    return text_config(config) is not config or isinstance(config.get("vision_config"), dict)


def is_tower(name: str) -> bool:
    """Whether a tensor belongs to another modality, by its name."""
    return _TOWER.search(name) is not None


def is_lookup(name: str) -> bool:
    """Whether a tensor is an input embedding or an output head by its name, a prediction layer's too."""
    return name.endswith(".weight") and leaf(name.removesuffix(".weight")) in EMBEDDINGS | LM_HEADS | {"head"}


def is_prediction(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor belongs to a multi-token prediction layer: named so, or a block behind the last."""
    if is_tower(name):
        return False
    blocks = text_config(config).get("num_hidden_layers")
    index = block_index(name)
    # bool is a subclass of int, so compare the type itself
    return bool(_DRAFT.search(name)) or (type(blocks) is int and index is not None and index >= blocks)


def leaf(module: str) -> str:
    """Last component of a module name."""
    return module.rpartition(".")[2]


def block_index(name: str) -> int | None:
    """Number of the repeated block that the tensor lies in, or None outside of blocks."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def fuse_group(module: str) -> str | None:
    """Name of the layer that the engine fuses ``module`` into, equal among its neighbours, or None."""
    parent, _, last = module.rpartition(".")
    fused = FUSED.get(last)
    return None if fused is None else f"{parent}.{fused}".lstrip(".")


def whole(header: TensorHeader, module: str) -> LinearPart:
    """The part that is all of a 2-D tensor ``[out_features, in_features]``."""
    out_features, in_features = header.shape
    return LinearPart(module, out_features, in_features, fuse_group=fuse_group(module))


def member_rows(part: LinearPart, config: dict[str, Any]) -> tuple[int, ...]:
    """Rows of each layer that a matrix holds: its own, or those of the members it is stored fused from.

    ``gate_up_proj`` holds two halves; ``qkv_proj`` holds the rows of q, k and v as the config tells them
    (transformers 5.17 modeling_phi3.py), or counts as one where it does not.
    """
    rows = part.out_features
    if leaf(part.module) == "gate_up_proj":
        return rows // 2, rows - rows // 2
    if leaf(part.module) != "qkv_proj":
        return (rows,)
    text = text_config(config)
    heads, kv_heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
    kv_heads = heads if kv_heads is None else kv_heads
    if type(heads) is not int or type(kv_heads) is not int or min(heads, kv_heads) < 1:
        return (rows,)
    head_rows, rest = divmod(rows, heads + 2 * kv_heads)
    return (rows,) if rest else (heads * head_rows, kv_heads * head_rows, kv_heads * head_rows)


def common_role(header: TensorHeader, config: dict[str, Any]) -> Role | None:
    """The role of tensors that every family treats alike, or None where the family must say.

    Towers and projectors of other modalities, draft layers, tensors that are not floating point, vectors,
    embeddings and heads.
    """
    if header.dtype not in FLOAT_DTYPES:
        return Role("other", reason=f"stored as {header.dtype}, not as a floating-point weight")
    if is_tower(header.name):
        return Role("other", reason="tower or projector of another modality")
    if is_prediction(header.name, config):
        return Role("other", reason=PREDICTION)
    index = block_index(header.name)
    if len(header.shape) < 2:
        return Role("other", reason=_vector_reason(header.name))
    module = header.name.removesuffix(".weight")
    if index is None and header.name.endswith(".weight") and len(header.shape) == 2:
        if leaf(module) in EMBEDDINGS:
            return Role("embedding", (whole(header, module),), "input embedding")
        if leaf(module) in LM_HEADS:
            return Role("lm_head", (whole(header, module),), "output head")
    return None


def _vector_reason(name: str) -> str:
    """What a vector or scalar is, told from its name."""
    if name.endswith("bias"):
        return "bias"
    return "norm" if "norm" in name or re.search(r"(^|\.)ln_", name) else "vector or scalar"


def input_norm(name: str, attention: str, mlp: str, offset: float) -> InputNorm | None:
    """The norm that feeds the tensor ``name``.

    ``attention``: its leaf for q/k/v and what else reads a block's input; ``mlp``: that for gate/up; there is
    none for the rest.
    """
    found = _FED_BY_NORM.match(name)
    if found is None:
        return None
    leaf = attention if found["attention"] else mlp
    return InputNorm(f"{found['layer']}.{leaf}.weight", offset)
