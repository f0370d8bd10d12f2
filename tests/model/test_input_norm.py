"""The norm that a family names as a layer's input is the one that feeds it in the real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.model.families import family_for
from compressor.spec import InputNorm, TensorHeader

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}


_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 48}
_LINEAR = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
# Beside the sizes.
MORE: dict[str, dict[str, Any]] = {
    "llama4_text": LLAMA4,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_next": {**_LINEAR, **_EXPERTS, "layer_types": ["linear_attention"]},
    "qwen3_5_text": {**_LINEAR, "layer_types": ["linear_attention"]},
    "qwen3_5_moe_text": {**_LINEAR, **_EXPERTS, "layer_types": ["full_attention"]},
    "glm4_moe": {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 48, "n_group": 1},
    "deepseek_v3": {
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
    },
    "jamba": {"num_experts": 1, "attn_layer_period": 1, "attn_layer_offset": 0},
}
MODEL_TYPES = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "smollm3", "phi3", "granite"),
    *("gemma", "gemma2", "gemma3_text", "qwen3_moe", *MORE),
)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_named_norm_feeds_the_layer(model_type: str) -> None:
    """Its output is what q and gate read, and divided by (weight + offset) it has a mean square of one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | MORE.get(model_type, {}))
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    outputs: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(_keeper(outputs, name, output=True))
        module.register_forward_pre_hook(_keeper(inputs, name, output=False))
    with torch.no_grad():
        model(torch.arange(3, 40)[None], use_cache=False)
    family = family_for(config.to_dict())
    weights = dict(model.named_parameters())
    fed = 0
    for name, parameter in weights.items():
        norm = family.role(TensorHeader(name, "F32", tuple(parameter.shape)), config.to_dict()).input_norm
        if norm is None:
            continue
        fed += 1
        linear, source = name.removesuffix(".weight"), norm.tensor.removesuffix(".weight")
        # Experts in one parameter are heard by the module that holds it, which is given single tokens.
        heard = inputs[linear if linear in inputs else linear.rpartition(".")[0]]
        assert torch.equal(heard.reshape(outputs[source].shape), outputs[source]), name
        plain = outputs[source] / (weights[norm.tensor] + norm.offset)
        assert torch.allclose((plain**2).mean(-1), torch.ones(()), atol=2e-3), name
    assert fed >= 2


def test_mixtral_names_its_norms_as_the_others() -> None:
    """Its experts have other names in memory than in a checkpoint."""
    family = family_for({"model_type": "mixtral"})
    for matrix, norm in {
        "self_attn.k_proj": "input_layernorm",
        "block_sparse_moe.experts.1.w1": "post_attention_layernorm",
        "block_sparse_moe.experts.1.w3": "post_attention_layernorm",
        "block_sparse_moe.experts.1.w2": None,
    }.items():
        role = family.role(TensorHeader(f"model.layers.3.{matrix}.weight", "BF16", (32, 32)), {})
        assert role.kind == "linear"
        assert role.input_norm == (norm and InputNorm(f"model.layers.3.{norm}.weight"))


def test_output_normalized_models_have_none() -> None:
    """OLMo 2 normalizes what attention and MLP give, not what they read."""
    family = family_for({"model_type": "olmo2"})
    header = TensorHeader("model.layers.0.self_attn.q_proj.weight", "BF16", (32, 32))
    assert family.role(header, {"model_type": "olmo2"}).input_norm is None


def _keeper(kept: dict[str, torch.Tensor], name: str, *, output: bool) -> Any:
    def keep(module: torch.nn.Module, arguments: Any, result: Any = None) -> None:
        value = result if output else (arguments[0] if arguments else None)
        if isinstance(value, torch.Tensor):
            kept[name] = value

    return keep
