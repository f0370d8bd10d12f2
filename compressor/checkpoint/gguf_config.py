"""Rebuilds config.json and the Hugging Face tensor names from GGUF metadata, without torch.

Sources: llama.cpp convert_hf_to_gguf.py (what is written) and huggingface/transformers 5.17
src/transformers/integrations/ggml.py, GGUF_CONFIG_MAPPING (how it is read back).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose, pi
from typing import Any

from compressor.checkpoint.gguf_file import GgufHeader
from compressor.errors import CheckpointError

ROPE_FREQS = "rope_freqs.weight"
OUTPUT = "output.weight"


@dataclass(frozen=True)
class Architecture:
    """What one GGUF architecture is in transformers.

    Attributes:
        model_class: for ``architectures`` in config.json.
        permuted: llama.cpp reordered the rows of q and k, so that rotary pairs are neighbours.
        qkv_bias: q, k and v have biases.
        qk_norm: q and k are normalised per head.
        fixed: further config fields.
    """

    model_class: str
    permuted: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()


ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM", permuted=True, fixed=(("attention_bias", False), ("mlp_bias", False))
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", qkv_bias=True, fixed=(("use_sliding_window", False),)),
    "qwen3": Architecture(
        "Qwen3ForCausalLM", qk_norm=True, fixed=(("attention_bias", False), ("use_sliding_window", False))
    ),
}


@dataclass(frozen=True, slots=True)
class Expected:
    """The Hugging Face name and shape of a GGUF tensor; ``heads`` if its rows must be put back in order."""

    name: str
    shape: tuple[int, ...]
    heads: int | None = None


def architecture(header: GgufHeader, where: str) -> Architecture:
    """The supported architecture of a file.

    Raises:
        CheckpointError: another one, or a file that is only a part of the model.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF architecture {str(name)[:40]!r} is not supported; supported: {', '.join(ARCHITECTURES)}",
            where=where,
            fix="use the safetensors checkpoint of this model",
        )
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            "one part of a split GGUF", where=where, fix="merge the parts with `llama-gguf-split --merge`"
        )
    if header.metadata.get(f"{name}.expert_count", 0):
        raise CheckpointError(
            f"GGUF {name} with experts is not supported", where=where, fix="use its safetensors checkpoint"
        )
    return ARCHITECTURES[name]


def build_config(header: GgufHeader, rope_factors: list[float] | None, where: str) -> dict[str, Any]:
    """The contents of config.json.

    Args:
        header: the file's header.
        rope_factors: values of ``rope_freqs.weight``, or None where the file has none.
        where: the file, for messages.

    Raises:
        CheckpointError: a field is missing or impossible, or positions are scaled in a way not known here.
    """
    kind = architecture(header, where)
    name = header.metadata["general.architecture"]
    fields = _Fields(header.metadata, name, where)
    hidden = fields.size("embedding_length")
    heads = fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.size(key, head_dim) != head_dim:
            raise fields.fault(f"{name}.{key} differs from the head size {head_dim}")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise fields.fault("tensor token_embd.weight is missing")
    ids = {
        ours: header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": [kind.model_class],
        "model_type": name,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": fields.size("feed_forward_length"),
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.size("context_length"),
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(fields, head_dim, rope_factors),
        "tie_word_embeddings": OUTPUT not in header.tensors,
        "vocab_size": embedding.shape[0],
        **{f"{ours}_token_id": value for ours, value in ids.items() if value is not None},
        **dict(kind.fixed),
    }


def expected_tensors(config: dict[str, Any], kind: Architecture) -> dict[str, Expected]:
    """GGUF name -> Hugging Face name and shape of every tensor that the model must have.

    Names: gguf-py gguf/tensor_mapping.py.
    """
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q_rows, kv_rows = q_heads * head_dim, kv_heads * head_dim
    layer = {
        "attn_norm.weight": Expected("input_layernorm.weight", (hidden,)),
        "ffn_norm.weight": Expected("post_attention_layernorm.weight", (hidden,)),
        "attn_q.weight": Expected(
            "self_attn.q_proj.weight", (q_rows, hidden), q_heads if kind.permuted else None
        ),
        "attn_k.weight": Expected(
            "self_attn.k_proj.weight", (kv_rows, hidden), kv_heads if kind.permuted else None
        ),
        "attn_v.weight": Expected("self_attn.v_proj.weight", (kv_rows, hidden)),
        "attn_output.weight": Expected("self_attn.o_proj.weight", (hidden, q_rows)),
        "ffn_gate.weight": Expected("mlp.gate_proj.weight", (inner, hidden)),
        "ffn_up.weight": Expected("mlp.up_proj.weight", (inner, hidden)),
        "ffn_down.weight": Expected("mlp.down_proj.weight", (hidden, inner)),
    }
    if kind.qkv_bias:
        for letter, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            layer[f"attn_{letter}.bias"] = Expected(f"self_attn.{letter}_proj.bias", (rows,))
    if kind.qk_norm:
        for letter in "qk":
            layer[f"attn_{letter}_norm.weight"] = Expected(f"self_attn.{letter}_norm.weight", (head_dim,))
    found = {
        "token_embd.weight": Expected("model.embed_tokens.weight", (config["vocab_size"], hidden)),
        "output_norm.weight": Expected("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        found[OUTPUT] = Expected("lm_head.weight", (config["vocab_size"], hidden))
    for number in range(config["num_hidden_layers"]):
        for theirs, ours in layer.items():
            name = f"model.layers.{number}.{ours.name}"
            found[f"blk.{number}.{theirs}"] = Expected(name, ours.shape, ours.heads)
    return found


class _Fields:
    """Checked access to ``ARCHITECTURE.*`` metadata."""

    def __init__(self, metadata: dict[str, Any], name: str, where: str) -> None:
        self._metadata, self._name, self.where = metadata, name, where

    def fault(self, what: str) -> CheckpointError:
        """An error about this file's metadata."""
        return CheckpointError(f"GGUF metadata: {what}", where=self.where)

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as stored."""
        return self._metadata.get(f"{self._name}.{key}", default)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; arrays (a value for each layer) are not supported."""
        value = self.raw(key, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self.fault(f"{self._name}.{key} must be one positive integer, not {str(value)[:40]}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.raw(key, default)
        if not isinstance(value, float | int) or not 0 < value < float("inf"):
            raise self.fault(f"{self._name}.{key} must be a positive number, not {str(value)[:40]}")
        return float(value)


def _rope(fields: _Fields, head_dim: int, factors: list[float] | None) -> dict[str, Any]:
    """``rope_parameters``: plain, linear, or the Llama 3 scaling recognised from its factors."""
    theta = fields.real("rope.freq_base", 10_000.0)
    scaling = fields.raw("rope.scaling.type", "none")
    if scaling == "linear" and factors is None:
        factor = fields.real("rope.scaling.factor")
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if scaling not in ("none", "linear") or (scaling == "linear" and factors is not None):
        raise CheckpointError(
            f"GGUF with rope scaling {str(scaling)[:40]!r}: its parameters cannot be told exactly",
            where=fields.where,
            fix="use the safetensors checkpoint of this model",
        )
    if factors is None:
        return {"rope_theta": theta, "rope_type": "default"}
    # Every Llama 3.x release has these three; only the factor (8 or 32) differs.
    llama3: dict[str, Any] = {
        "factor": max(factors, default=1.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    known = _llama3_factors(head_dim, theta, **llama3)
    if len(factors) != len(known) or not all(map(_close, factors, known)):
        raise CheckpointError(
            f"{ROPE_FREQS} holds position factors that are not those of Llama 3",
            where=fields.where,
            fix="use the safetensors checkpoint of this model",
        )
    return {"rope_theta": theta, "rope_type": "llama3", **llama3}


def _close(left: float, right: float) -> bool:
    return isclose(left, right, rel_tol=1e-4)


def _llama3_factors(
    head_dim: int,
    theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> list[float]:
    """The divisors [head_dim / 2] of the rotary frequencies.

    llama.cpp convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors.
    """
    found = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * pi * theta ** (pair / head_dim)
        turns = original_max_position_embeddings / wavelength
        if turns > high_freq_factor:
            found.append(1.0)
        elif turns < low_freq_factor:
            found.append(factor)
        else:
            smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found
