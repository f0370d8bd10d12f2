"""Tiny random models in bf16 whose tensors are named as in published checkpoints, prediction layers included.

transformers saves neither prediction layers nor, of Qwen3.5, experts in 3-D tensors: both are added here.
Routers' corrections are in fp32, as published.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model, tokens_of_bytes

# Widths that a scheme of groups of 16 divides; heads and experts as few as the configs allow.
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR_ATTENTION: dict[str, Any] = {
    "num_hidden_layers": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_SHARED = {"num_experts": 4, "shared_expert_intermediate_size": 32, **_EXPERTS}
_BEHIND = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, **_EXPERTS}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
_PROJECTION = re.compile(r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<kind>gate|up|down)_proj\.weight$")

Tensors = dict[str, torch.Tensor]


def _saved(folder: Path, class_name: str, config: Any) -> Tensors:
    import transformers

    tiny_model(folder, getattr(transformers, class_name), config, torch.bfloat16)
    return load_file(folder / "model.safetensors")


def _stored(folder: Path, tensors: Tensors, **keys: Any) -> Path:
    """Writes the tensors, and ``keys`` into config.json (those of a nested text config into that)."""
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw.get("text_config", raw).update(keys)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    return folder


def _noise(seed: int, tensors: Mapping[str, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in tensors.items():
        noise = torch.randn(shape, generator=generator) * 0.1
        made[name] = (noise + 1 if len(shape) == 1 else noise).to(torch.bfloat16)
    return made


def _copied(tensors: Tensors, block: str, to: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a block's tensors, under another block's name."""
    return {
        name.replace(block, to, 1): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith(block)
    }


def fused(tensors: Tensors) -> Tensors:
    """Experts stored one by one, put into ``gate_up_proj`` [E, 2 * I, H] and ``down_proj`` [E, H, I]."""
    made: Tensors = {}
    experts: dict[str, dict[int, Tensors]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        found = _PROJECTION.match(name)
        if found is None:
            made[name] = tensor
        else:
            experts[found["experts"]][int(found["expert"])][found["kind"]] = tensor
    for path, each in experts.items():
        ordered = [each[index] for index in range(len(each))]
        made[f"{path}.gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in ordered])
        made[f"{path}.down_proj"] = torch.stack([one["down"] for one in ordered])
    return made


def _under_mtp(tensors: Tensors, attention_block: str) -> Tensors:
    """``mtp.*`` as Qwen3-Next and Qwen3.5 have it: a block of full attention, norms, and ``fc``."""
    hidden = tensors[f"{attention_block}input_layernorm.weight"].shape[0]
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    shapes = _copied(tensors, attention_block, "mtp.layers.0.")
    shapes |= {f"mtp.{norm}.weight": (hidden,) for norm in norms}
    return _noise(7, shapes | {"mtp.fc.weight": (hidden, 2 * hidden)})


def _behind_the_last(tensors: Tensors, layers: int) -> Tensors:
    """The block ``layers``, as DeepSeek-V3 and GLM-4-MoE have it: with norms, ``eh_proj`` and both ends."""
    last, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    vocabulary, hidden = tensors["model.embed_tokens.weight"].shape
    shapes = _copied(tensors, last, new)
    shapes |= {f"{new}{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    ends = {f"{new}{end}.weight": (vocabulary, hidden) for end in ("embed_tokens", "shared_head.head")}
    return _noise(8, shapes | ends | {f"{new}eh_proj.weight": (hidden, 2 * hidden)})


def _plain(class_name: str, config_name: str, **more: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        import transformers

        config = getattr(transformers, config_name)(**{**tokens_of_bytes(), **_COMMON, **more})
        return _stored(folder, _saved(folder, class_name, config))

    return build


def _qwen3_next(folder: Path, *, fuse: bool = False) -> Path:
    """``fuse``: experts as transformers has them in memory, in the prediction layer too."""
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(**tokens_of_bytes(), **_COMMON, **_LINEAR_ATTENTION, **_SHARED)
    tensors = _saved(folder, "Qwen3NextForCausalLM", config)
    tensors |= _under_mtp(tensors, "model.layers.1.")
    return _stored(folder, fused(tensors) if fuse else tensors, num_nextn_predict_layers=1)


def _qwen3_5(folder: Path) -> Path:
    """Dense, text only."""
    from transformers import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**tokens_of_bytes(), **_COMMON, **_LINEAR_ATTENTION)
    tensors = _saved(folder, "Qwen3_5ForCausalLM", config)
    return _stored(folder, tensors | _under_mtp(tensors, "model.layers.1."), mtp_num_hidden_layers=1)


def _qwen3_5_moe(folder: Path) -> Path:
    """With a vision tower; experts fused, in the prediction layer too."""
    from transformers import Qwen3_5MoeConfig

    text = {**tokens_of_bytes(), **_COMMON, **_LINEAR_ATTENTION, **_SHARED}
    config = Qwen3_5MoeConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 0, 0]}},
        vision_config=_TOWER,
        tie_word_embeddings=False,
    )
    tensors = _saved(folder, "Qwen3_5MoeForConditionalGeneration", config)
    tensors = tensors | _under_mtp(tensors, "model.language_model.layers.1.")
    return _stored(folder, fused(tensors), mtp_num_hidden_layers=1)


def _with_block_behind(class_name: str, config_name: str, **more: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        import transformers

        settings = {**tokens_of_bytes(), **_COMMON, **_BEHIND, "num_hidden_layers": 2, **more}
        tensors = _saved(folder, class_name, getattr(transformers, config_name)(**settings))
        return _stored(folder, tensors | _behind_the_last(tensors, 2), num_nextn_predict_layers=1)

    return build


# Name -> writes the model into a folder.
PUBLISHED: Mapping[str, Callable[[Path], Path]] = {
    "mixtral": _plain(
        "MixtralForCausalLM", "MixtralConfig", num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": _plain(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_hidden_layers=2, num_experts=4, **_EXPERTS
    ),
    "qwen3_next": _qwen3_next,
    "qwen3_next_fused": lambda folder: _qwen3_next(folder, fuse=True),
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "glm4_moe": _with_block_behind("Glm4MoeForCausalLM", "Glm4MoeConfig"),
    "deepseek_v3": _with_block_behind("DeepseekV3ForCausalLM", "DeepseekV3Config", **_LATENT),
    "jamba": _plain(
        "JambaForCausalLM",
        "JambaConfig",
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
}
