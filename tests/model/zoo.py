"""A tiny random model of each family that the walk knows, as small as its config allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.model.wrappers import WRAPPERS
from tests.tiny import tiny_model, tokens_of_bytes

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
# One block of each kind of attention, routed by a table and by scores.
_DEEPSEEK_V4: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "layer_types": [
        *("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
    ],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "sliding_window": 8,
    "q_lora_rank": 16,
    "partial_rotary_factor": 0.5,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "hc_mult": 2,
    "num_nextn_predict_layers": 0,
}
_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
# Its norms have no weights; it takes no ``head_dim``.
_OLMO: dict[str, Any] = {
    **{name: value for name, value in _COMMON.items() if name != "head_dim"},
    "clip_qkv": 6.0,
}


def _of(model: str, config: str, *, common: bool = True, **more: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        import transformers

        settings = {**tokens_of_bytes(), **(_COMMON if common else {}), **more}
        made = getattr(transformers, config)(**settings)
        return tiny_model(folder, getattr(transformers, model), made, torch.float32)

    return build


def _gpt(model: str, config: str, **more: Any) -> Callable[[Path], Path]:
    return _of(model, config, common=False, **more)


FAMILIES: Mapping[str, Callable[[Path], Path]] = {
    "llama": _of("LlamaForCausalLM", "LlamaConfig"),
    "llama_tied": _of("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True),
    "llama_yarn": _of(
        "LlamaForCausalLM",
        "LlamaConfig",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "mistral": _of("MistralForCausalLM", "MistralConfig", sliding_window=8),
    "qwen2": _of("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": _of("Qwen3ForCausalLM", "Qwen3Config"),
    "smollm3": _of("SmolLM3ForCausalLM", "SmolLM3Config"),
    "phi3": _of("Phi3ForCausalLM", "Phi3Config"),
    "gemma": _of("GemmaForCausalLM", "GemmaConfig", tie_word_embeddings=True),
    "gemma2": _of("Gemma2ForCausalLM", "Gemma2Config", sliding_window=8),
    "gemma3": _of(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        sliding_window=8,
        tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "granite": _of("GraniteForCausalLM", "GraniteConfig", logits_scaling=3.0, residual_multiplier=0.5),
    # Values are clamped: none of those that it makes, but what large scales make of them.
    "olmo": _of("OlmoForCausalLM", "OlmoConfig", common=False, **_OLMO),
    "olmo2": _of("Olmo2ForCausalLM", "Olmo2Config"),
    "falcon": _gpt(
        "FalconForCausalLM",
        "FalconConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        new_decoder_architecture=False,
        bias=False,
    ),
    "gpt2": _gpt("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": _gpt(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    "opt": _gpt(
        "OPTForCausalLM",
        "OPTConfig",
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    ),
    "bloom": _gpt("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4),
    "starcoder2": _of("Starcoder2ForCausalLM", "Starcoder2Config"),
    "stablelm": _of("StableLmForCausalLM", "StableLmConfig"),
    "cohere": _of("CohereForCausalLM", "CohereConfig", tie_word_embeddings=True),
    "glm4": _of("Glm4ForCausalLM", "Glm4Config"),
    "llama4": _of(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        intermediate_size_mlp=40,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        num_hidden_layers=4,
        attention_chunk_size=8,
    ),
    "mixtral": _of("MixtralForCausalLM", "MixtralConfig", num_local_experts=4),
    "qwen2_moe": _of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", shared_expert_intermediate_size=24, **_EXPERTS),
    "qwen3_moe": _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_EXPERTS),
    "qwen3_next": _of(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        shared_expert_intermediate_size=24,
        **_EXPERTS,
        **_LINEAR_ATTENTION,
    ),
    "qwen3_5": _of("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", **_LINEAR_ATTENTION),
    "qwen3_5_moe": _of(
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        shared_expert_intermediate_size=24,
        **_EXPERTS,
        **_LINEAR_ATTENTION,
    ),
    "olmoe": _of("OlmoeForCausalLM", "OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "phimoe": _of("PhimoeForCausalLM", "PhimoeConfig", num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": _of(
        "GraniteMoeForCausalLM", "GraniteMoeConfig", num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v2": _of(
        "DeepseekV2ForCausalLM", "DeepseekV2Config", **(_DEEPSEEK | {"topk_method": "greedy"})
    ),
    "deepseek_v3": _of("DeepseekV3ForCausalLM", "DeepseekV3Config", **_DEEPSEEK),
    "glm4_moe": _of(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "gpt_oss": _of(
        "GptOssForCausalLM",
        "GptOssConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v4": _of("DeepseekV4ForCausalLM", "DeepseekV4Config", **_DEEPSEEK_V4),
    "jamba": _of(
        "JambaForCausalLM",
        "JambaConfig",
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "olmo_hybrid": _of("OlmoHybridForCausalLM", "OlmoHybridConfig", **_LINEAR_ATTENTION),
    "lfm2": _of(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    "mamba": _gpt("MambaForCausalLM", "MambaConfig", hidden_size=32, num_hidden_layers=2, state_size=8),
    "mamba2": _gpt(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        head_dim=16,
        num_heads=4,
        n_groups=1,
        chunk_size=8,
    ),
    "nemotron_h": _of(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        layers_block_type=["mamba", "moe", "attention", "mlp"],
        num_hidden_layers=4,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        n_group=1,
        topk_group=1,
    ),
    **WRAPPERS,
}

# Known to transformers, but not to be replayed block by block: name -> (maker, why).
REFUSED: Mapping[str, tuple[Callable[[Path], Path], str]] = {
    "gemma3n": (
        _of(
            "Gemma3nForCausalLM",
            "Gemma3nTextConfig",
            num_hidden_layers=5,
            vocab_size_per_layer_input=256,
            laurel_rank=8,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=None,
        ),
        "leaves something for later blocks",
    ),
    "rwkv": (
        _gpt("RwkvForCausalLM", "RwkvConfig", hidden_size=32, num_hidden_layers=2, intermediate_size=48),
        "cannot be recorded",
    ),
}
