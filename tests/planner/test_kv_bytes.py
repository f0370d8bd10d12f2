"""Cache bytes: known answers, transformers' defaults, and caches that transformers itself fills."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from compressor.planner.kv_architectures import ARCHITECTURES
from compressor.planner.kv_bytes import full_context, kv_bytes

GIB = 2**30
CONTEXT = 131_072

LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def known(config: dict[str, Any], tokens: int, bits: int = 16):
    """The bytes of a config that must be known."""
    found, reason = kv_bytes(config, tokens, bits=bits)
    assert found is not None, reason
    assert reason == ""
    return found


def test_70b_at_128k_takes_40_gib():
    """80 layers x 8 KV heads x 128, keys and values."""
    found = known(LLAMA_70B, CONTEXT)
    assert found.per_token_bytes == 327_680
    assert found.total_bytes == 40 * GIB
    assert known(LLAMA_70B, CONTEXT, bits=8).total_bytes == 20 * GIB


def test_qwen3_next_80b():
    """24,576 B a token in its 12 full-attention layers, and 72 MiB of fp32 states."""
    found = known({"model_type": "qwen3_next"}, CONTEXT)
    convolutions = 36 * 3 * (2 * 16 * 128 + 32 * 128) * 2
    assert found.per_token_bytes == 24_576
    assert found.state_bytes == 72 * 2**20 + convolutions
    assert found.total_bytes == 3 * GIB + found.state_bytes


def test_latent_attention_of_61_layers():
    """512 + 64 elements a layer, whatever the number of heads."""
    found = known({"model_type": "deepseek_v3"}, CONTEXT)
    assert found.per_token_bytes == 70_272
    assert round(found.total_bytes / GIB, 2) == 8.58


def test_chunked_attention_of_scout_stops_growing():
    """36 of 48 layers keep 8192 tokens at most; the nested config and its defaults are found."""
    config = {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}
    per_layer = 2 * 8 * 128 * 2
    assert known(config, 4096).total_bytes == 48 * per_layer * 4096
    assert known(config, CONTEXT).total_bytes == per_layer * (36 * 8192 + 12 * CONTEXT)
    assert known(config, CONTEXT).per_token_bytes == 12 * per_layer
    by_rope = {"model_type": "llama4_text", "num_hidden_layers": 4, "no_rope_layers": [1, 0, 0, 0]}
    assert known(by_rope, CONTEXT).per_token_bytes == 3 * per_layer


def test_jamba_keeps_states_in_seven_of_eight_layers():
    """d_inner x (d_state + d_conv - 1) 16-bit elements a Mamba layer."""
    found = known({"model_type": "jamba"}, 1000)
    assert found.state_bytes == 28 * 8192 * (16 + 3) * 2
    assert found.total_bytes == found.state_bytes + 4 * 2 * 8 * 128 * 2 * 1000


@pytest.mark.parametrize(
    "model_type",
    sorted(ARCHITECTURES),
)
def test_missing_keys_have_transformers_defaults(model_type):
    """A bare model_type counts as the configuration class with every key written out."""
    defaults = transformers.AutoConfig.for_model(model_type).to_dict()
    for tokens in (100, CONTEXT):
        assert known({"model_type": model_type}, tokens).total_bytes == known(defaults, tokens).total_bytes


SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 8
MODELS = {
    "llama": {"num_hidden_layers": 2},
    "mistral": {"num_hidden_layers": 2, "sliding_window": WINDOW},
    "qwen2": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": WINDOW},
    "gemma3n_text": {
        "num_hidden_layers": 10,
        "sliding_window": WINDOW,
        "num_kv_shared_layers": 5,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 32,
        "laurel_rank": 4,
    },
    "gpt_oss": {
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "llama4_text": {
        "num_hidden_layers": 5,
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 32,
        "num_local_experts": 2,
    },
    "qwen3_next": {
        "num_hidden_layers": 5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "jamba": {"num_hidden_layers": 6, "num_experts": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False},
}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("tokens", [5, 21])
def test_attention_caches_have_the_size_that_transformers_fills(model_type, tokens):
    """A second count: run a tiny random model and add up its cached keys and values.

    transformers keeps one token less than a window, which it joins with the current one.
    """
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **MODELS[model_type]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), past_key_values=cache)
    cached = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            cached += layer.keys.nbytes + layer.values.nbytes
    counted = known(config.to_dict(), tokens, bits=32)
    short = sum(
        part.token_bytes for part in counted.parts if part.window is not None and tokens >= part.window
    )
    assert cached == counted.total_bytes - counted.state_bytes - short


def test_recurrent_states_have_the_size_that_transformers_keeps():
    """The gated delta rule's fp32 state of a tiny Qwen3-Next."""
    config = transformers.AutoConfig.for_model("qwen3_next", **{**SMALL, **MODELS["qwen3_next"]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
    states = [layer.recurrent_states for layer in cache.layers if hasattr(layer, "recurrent_states")]
    tensors = [t for s in states for t in (s.values() if isinstance(s, dict) else [s]) if t is not None]
    convolutions = 4 * 3 * (2 * 2 * 8 + 4 * 4) * 2
    assert sum(t.numel() for t in tensors) * 4 == known(config.to_dict(), 3).state_bytes - convolutions


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"model_type": "mamba9"}, "'mamba9'"),
        ({}, "not known"),
        ({"model_type": "llama", "num_hidden_layers": "many"}, "num_hidden_layers of the config is 'many'"),
        ({"model_type": "llama", "num_hidden_layers": -1}, "num_hidden_layers"),
        ({"model_type": "llama", "num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"model_type": "llama", "head_dim": True}, "head_dim"),
        ({"model_type": "llama", "head_dim": 10**30}, "head_dim of the config is 1000"),
        ({"model_type": "llama", "head_dim": [0] * 9999}, "0, 0, ..., not a positive number"),
        ({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 16}, "hidden_size"),
        (
            {"model_type": "gemma3n_text", "num_kv_shared_layers": "3"},
            "num_kv_shared_layers of the config is",
        ),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": -1}, "num_kv_shared_layers of the config is"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers"),
        ({"model_type": "jamba", "attn_layer_offset": "4"}, "attn_layer_offset"),
        ({"model_type": "llama", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "llama", "num_hidden_layers": 1, "layer_types": ["conv"]}, "'conv'"),
        (
            {"model_type": "llama", "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
            "linear_attention",
        ),
        ({"model_type": "llama", "num_hidden_layers": 1, "layer_types": [{}]}, "layer_types"),
        ({"model_type": "llama4_text", "attention_chunk_size": None}, "attention_chunk_size"),
        ({"model_type": "llama4_text", "no_rope_layers": [1]}, "no_rope_layers"),
        ({"model_type": "qwen3_moe", "use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_what_cannot_be_told_has_a_reason_and_no_number(config, reason):
    """Never a guess."""
    found, told = kv_bytes(config, 1000)
    assert found is None
    assert reason in told


def test_full_context_is_the_language_models():
    """From the nested config; None where there is none."""
    assert full_context({"text_config": {"max_position_embeddings": 4096}}) == 4096
    assert full_context({"max_position_embeddings": "4096"}) is None
    assert full_context({"max_position_embeddings": True}) is None
    assert full_context({"max_position_embeddings": 10**30}) is None
    assert full_context({}) is None
