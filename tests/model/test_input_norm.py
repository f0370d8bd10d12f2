"""The norm that a family names as a layer's input is the one that feeds it in the real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.model.families import family_for
from compressor.spec import TensorHeader

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


MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite"),
    *("gemma", "gemma2", "gemma3_text", "llama4_text"),
)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_named_norm_feeds_the_layer(model_type: str) -> None:
    """Its output is what q and gate read, and divided by (weight + offset) it has a mean square of one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **(LLAMA4 if model_type == "llama4_text" else {}))
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    outputs: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(_keeper(outputs, name, output=True))
        module.register_forward_pre_hook(_keeper(inputs, name, output=False))
    with torch.no_grad():
        model(torch.arange(3, 40)[None])
    family = family_for(config.to_dict())
    weights = dict(model.named_parameters())
    fed = 0
    for name, parameter in weights.items():
        norm = family.role(TensorHeader(name, "F32", tuple(parameter.shape)), config.to_dict()).input_norm
        if norm is None:
            continue
        fed += 1
        linear, source = name.removesuffix(".weight"), norm.tensor.removesuffix(".weight")
        assert torch.equal(inputs[linear], outputs[source]), name
        plain = outputs[source] / (weights[norm.tensor] + norm.offset)
        assert torch.allclose((plain**2).mean(-1), torch.ones(()), atol=2e-3), name
    assert fed >= 2


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
