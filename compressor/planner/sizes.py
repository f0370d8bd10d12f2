"""What several parts of a plan count alike: widths, active parameters, and what a key must know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from compressor.device import has_accelerator
from compressor.model.families import block_index, text_config
from compressor.stages.base import Claim

Device = Literal["cpu", "cuda"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# Tokens of one forward pass: enough to keep matrix products busy, few enough for the activations.
BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
# Floating-point operations a second. CPU: a core or two in passes of SmolLM2-135M over 16,384 tokens;
# accelerators: a fifth of an H100's peak in bfloat16, not measured.
FLOPS = {"cpu": 9e10, "cuda": 2e14}
# Of a config that does not say; larger than most.
_ASSUMED_HIDDEN = 8192
_ASSUMED_VOCABULARY = 128_000
# In the names of routed experts, not of those that all tokens pass (``.shared_experts.``).
_ROUTED = ".experts."
# How many experts there are, and how many a token passes, as configs of transformers 5.17 spell it.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Residual streams beside one another (DeepSeek-V4's hyper-connections).
_STREAMS = ("hc_mult",)
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k")


def planned_device() -> Device:
    """Where a run on this machine computes."""
    return "cuda" if has_accelerator() else "cpu"


def hidden_size(config: dict[str, Any]) -> int:
    """Width of the hidden states, all parallel streams together; a large one where the config has none."""
    return (_number(config, ("hidden_size",)) or _ASSUMED_HIDDEN) * (_number(config, _STREAMS) or 1)


def vocabulary_size(config: dict[str, Any]) -> int:
    """Logits of a token; many where the config does not say."""
    return _number(config, ("vocab_size",)) or _ASSUMED_VOCABULARY


def in_block(claim: Claim) -> bool:
    """Whether the tensor lies in a repeated block."""
    return block_index(claim.tensor.name) is not None


def is_routed(name: str) -> bool:
    """Whether a tensor or module is of experts that a router chooses."""
    return _ROUTED in name


def routed_share(config: dict[str, Any]) -> float:
    """The share of the routed experts that one token passes; 1 where the config does not say."""
    experts, chosen = expert_counts(config)
    return min(1.0, chosen / experts) if experts and chosen else 1.0


def expert_counts(config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Routed experts of a layer, and how many a token passes; None where the config does not say."""
    return _number(config, _EXPERTS), _number(config, _EXPERTS_PER_TOKEN)


def computed_share(config: dict[str, Any]) -> float:
    """The share of the routed experts that is computed for one token: those that it passes.

    For Llama 4 all: the others get zeros (transformers 5.17 ``modeling_llama4.py`` Llama4TextMoe).
    """
    return 1.0 if text_config(config).get("model_type") == "llama4_text" else routed_share(config)


def active_parameters(claims: Sequence[Claim], config: dict[str, Any]) -> float:
    """Parameters that are computed with for one token: of routed experts, ``computed_share``."""
    share = computed_share(config)
    return sum(claim.tensor.numel * (share if is_routed(claim.tensor.name) else 1.0) for claim in claims)


def quantized_content(claims: Sequence[Claim]) -> list[list[Any]]:
    """JSON-able, for a stage's key: every quantized tensor, how it is stored and solved."""
    return [
        [
            claim.tensor.name,
            asdict(claim.role),
            claim.scheme.model_dump(mode="json"),
            claim.solver.model_dump(mode="json"),
        ]
        for claim in claims
        if claim.scheme is not None and claim.solver is not None
    ]


def _number(config: dict[str, Any], keys: Sequence[str]) -> int | None:
    """The first of the keys that is a positive integer, in the language model's part of a config."""
    text = text_config(config)
    # bool is a subclass of int, so compare the type itself
    return next((text[key] for key in keys if type(text.get(key)) is int and text[key] > 0), None)


def pass_flops(claims: Sequence[Claim], config: dict[str, Any], tokens: int) -> float:
    """Of one forward pass over a text: products with weights, and causal attention."""
    text = text_config(config)
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    attention = 0.0
    if isinstance(layers, int) and isinstance(heads, int) and heads > 0:
        width = text.get("head_dim") or hidden_size(config) // heads
        attention = 2.0 * layers * heads * width * tokens**2
    return 2 * active_parameters(claims, config) * tokens + attention
