"""What an EAGLE-3 head for a target looks like, told from its config. For plans: no torch.

Sizes and positions are the target's, so that its embedding and output head can be shared and the last layer
can be copied (EAGLE-3, arXiv 2503.01840, section 3; vLLM 0.32 model_executor/models/llama_eagle3.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.errors import CheckpointError, UserError
from compressor.model.families.naming import TEXT_KEYS

# The key of the hidden states that enter decoder layer n is n; of these many an EAGLE-3 head reads three.
_STATES = 3
# vLLM 0.32 gives more families to a head; these share embedding and output as they are, without a factor.
TARGETS = ("llama", "llama4_text")
# vLLM 0.32's and transformers 5.17's tables of these agree, whatever the length of a text is.
_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "longrope")
_FROM_LENGTH = ("yarn", "llama3", "longrope")
_LEGACY_THETA = 1e4  # transformers 5.17, LlamaConfig.default_theta
_LARGEST = 2**24
_LARGEST_NUMBER = 1e18


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head.

    Attributes:
        layers: which hidden states of the target are read, increasing.
        hidden_size: of the target and of the head.
        intermediate_size: of the head's MLP.
        heads: of its attention.
        kv_heads: of its keys and values.
        head_dim: dimensions of each.
        vocabulary: tokens of the target.
        draft_vocabulary: tokens that the head knows; all of the target's where they are as many.
        rope: ``rope_parameters``: the target's.
        positions: ``max_position_embeddings``: the target's.
        eps: of its norms.
        norm_before_residual: whether the residual stream starts behind the norm of the hidden state.
    """

    layers: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    draft_vocabulary: int
    rope: Mapping[str, Any]
    positions: int
    eps: float
    norm_before_residual: bool = True

    @property
    def reduced(self) -> bool:
        """Whether the head knows fewer tokens than the target, and has an output head of its own."""
        return self.draft_vocabulary != self.vocabulary

    def layer_config(self) -> dict[str, Any]:
        """A LlamaConfig's fields: ``transformer_layer_config`` of the speculators format."""
        more = {} if len(self.layers) == _STATES else {"num_aux_hidden_states": len(self.layers)}
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.eps,
            "rope_parameters": dict(self.rope),
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            **more,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the stored floating-point tensors, as vLLM names them."""
        wide, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = "layers.0"
        return {
            "fc.weight": (wide, wide * len(self.layers)),
            f"{layer}.input_layernorm.weight": (wide,),
            f"{layer}.hidden_norm.weight": (wide,),
            f"{layer}.self_attn.q_proj.weight": (queries, 2 * wide),
            f"{layer}.self_attn.k_proj.weight": (keys, 2 * wide),
            f"{layer}.self_attn.v_proj.weight": (keys, 2 * wide),
            f"{layer}.self_attn.o_proj.weight": (wide, queries),
            f"{layer}.post_attention_layernorm.weight": (wide,),
            f"{layer}.mlp.gate_proj.weight": (inner, wide),
            f"{layer}.mlp.up_proj.weight": (inner, wide),
            f"{layer}.mlp.down_proj.weight": (wide, inner),
            "norm.weight": (wide,),
            **({"lm_head.weight": (self.draft_vocabulary, wide)} if self.reduced else {}),
        }

    @property
    def parameters(self) -> int:
        """How many numbers the head has of its own."""
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in self.tensors().values())


def shape_for(
    config: Mapping[str, Any],
    *,
    layers: Sequence[int] = (),
    draft_vocabulary: int | None = None,
    norm_before_residual: bool = True,
) -> HeadShape:
    """The head for a target.

    Args:
        config: the target's config.json; how its weights are quantized does not matter.
        layers: hidden states to read; empty for the usual ones (``usual_layers``).
        draft_vocabulary: tokens that the head knows; None for all.
        norm_before_residual: see ``HeadShape``.

    Raises:
        UserError: what is asked does not fit the target, or vLLM serves no such head for it.
        CheckpointError: the config lacks a size.
    """
    text = _text(config)
    kind = text.get("model_type")
    if kind not in TARGETS:
        raise UserError(
            f"no EAGLE-3 head is made for model_type {kind!r}; it is for {' and '.join(TARGETS)}",
            where="drafts.kind",
            fix="use kind draft_model, or native where the checkpoint has prediction layers",
        )
    depth, wide = _size(text, "num_hidden_layers"), _size(text, "hidden_size")
    heads = _size(text, "num_attention_heads")
    vocabulary = _size(text, "vocab_size")
    known = vocabulary if draft_vocabulary is None else draft_vocabulary
    if not 0 < known <= vocabulary:
        raise UserError(
            f"a draft vocabulary of {known:,} tokens, the target has {vocabulary:,}",
            where="drafts.train.vocabulary_size",
            fix=f"set it to {vocabulary} at most, or leave it out",
        )
    return HeadShape(
        layers=_checked_layers(layers, depth) if layers else usual_layers(depth),
        hidden_size=wide,
        intermediate_size=_intermediate(text, depth),
        heads=heads,
        kv_heads=_size(text, "num_key_value_heads", heads),
        head_dim=_size(text, "head_dim", wide // heads),
        vocabulary=vocabulary,
        draft_vocabulary=known,
        rope=rope_of(text),
        positions=_size(text, "max_position_embeddings"),
        eps=_number(text, "rms_norm_eps", 1e-6),
        norm_before_residual=norm_before_residual,
    )


def usual_layers(depth: int) -> tuple[int, ...]:
    """Hidden states that a head reads of a target with ``depth`` layers: of the beginning, middle and end.

    2, depth / 2 and depth - 3 (vLLM 0.32, interfaces.py, SupportsEagle3), as far as these differ and exist;
    else the last ones beside them. Fewer than three where there are fewer layers. Never what leaves the last
    layer: transformers and vLLM mean different things by it (behind and before the last norm).
    """
    found = {min(max(n, 0), depth - 1) for n in (2, depth // 2, depth - 3)}
    for more in reversed(range(depth)):
        if len(found) >= min(_STATES, depth):
            break
        found.add(more)
    return tuple(sorted(found))


def rope_of(text: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` that turn the head's queries and keys as the target's are turned.

    Raises:
        UserError: a head cannot follow them.
        CheckpointError: they cannot be read.
    """
    told = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(told, Mapping):
        raise CheckpointError("rope_parameters is no JSON object", where="config.json")
    found = dict(told)
    legacy = found.pop("type", None)
    found.setdefault("rope_type", legacy or "default")
    found["rope_theta"] = _number(found, "rope_theta", _number(text, "rope_theta", _LEGACY_THETA))
    if found["rope_type"] in _FROM_LENGTH:
        # transformers 5.17 (modeling_rope_utils.py) fills it in so, vLLM 0.32 wants it there.
        length = text.get("original_max_position_embeddings")
        length = length or found.get("original_max_position_embeddings")
        found["original_max_position_embeddings"] = length or text.get("max_position_embeddings")
        _size(found, "original_max_position_embeddings")
    reason = _rope_refusal(found, text)
    if reason:
        raise UserError(
            f"{reason}, so that a head's positions would not be the target's",
            where="config.json",
            fix="scale its positions by yarn, or leave the section drafts out",
        )
    return found


def _rope_refusal(rope: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    kind = rope["rope_type"]
    if kind == "dynamic":
        return "dynamic scaling changes with the text, and vLLM does not serve it"
    if kind not in _ROPE_TYPES:
        return f"rope_type is {kind!r}, none of {', '.join(_ROPE_TYPES)}"
    if any(isinstance(value, Mapping) for value in rope.values()):
        return "its layers turn positions in different ways"
    if kind == "longrope" and rope.get("short_factor") != rope.get("long_factor"):
        return "longrope with other factors for short texts switches within a text"
    if rope.get("partial_rotary_factor", text.get("partial_rotary_factor") or 1) != 1:
        return "only a part of each head is turned"
    return ""


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in TEXT_KEYS:
        if isinstance(config.get(key), Mapping):
            return _text(config[key])
    return config


def _intermediate(text: Mapping[str, Any], depth: int) -> int:
    """Of the last layer; in Llama 4's layers with experts, of the expert that every token passes."""
    if text.get("model_type") == "llama4_text" and not _ends_with_experts(text, depth):
        return _size(text, "intermediate_size_mlp")
    return _size(text, "intermediate_size")


def _ends_with_experts(text: Mapping[str, Any], depth: int) -> bool:
    """Whether the last layer of a Llama 4 has experts (vLLM 0.32, models/llama4.py, Llama4DecoderLayer)."""
    key = "interleave_moe_layer_step"
    return text.get(key) != 0 and depth % _size(text, key, 1) == 0


def _checked_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    chosen = tuple(layers)
    # vLLM hands them over in the order of the layers, each once.
    if sorted(set(chosen)) != list(chosen) or chosen[0] < 0 or chosen[-1] >= depth:
        raise UserError(
            f"hidden states {list(chosen)} must be increasing, from 0 to {depth - 1}", where="drafts.train"
        )
    return chosen


def _size(text: Mapping[str, Any], key: str, default: int | None = None) -> int:
    found = text.get(key)
    if found is None:
        found = default
    if type(found) is not int or not 0 < found < _LARGEST:
        raise CheckpointError(f"{key} is {str(found)[:60]!r}, not a size", where="config.json")
    return found


def _number(text: Mapping[str, Any], key: str, default: float) -> float:
    found = text.get(key)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < _LARGEST_NUMBER:
        raise CheckpointError(f"{key} is {str(found)[:60]!r}, not a number above 0", where="config.json")
    return float(found)
