"""Tiny random models in bf16 whose tensors are named as in published checkpoints, prediction layers included.

transformers saves neither prediction layers nor, of Qwen3.5, experts in 3-D tensors: both are added here.
Routers' corrections are in fp32, as published.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model, tokens_of_bytes


@dataclass(frozen=True)
class Widths:
    """Sizes of the models; all multiples of 16, the least that every scheme's groups can be."""

    hidden: int
    intermediate: int
    expert: int
    head: int
    linear_head: int
    latent: int
    rope: int

    @property
    def common(self) -> dict[str, Any]:
        """Of every config."""
        return {
            **tokens_of_bytes(),
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": self.head,
        }

    @property
    def experts(self) -> dict[str, Any]:
        """Four, of which each token uses two."""
        return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": self.expert}

    @property
    def linear_attention(self) -> dict[str, Any]:
        """In the first of two layers."""
        return {
            "linear_key_head_dim": self.linear_head,
            "linear_value_head_dim": self.linear_head,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        }

    @property
    def latent_attention(self) -> dict[str, Any]:
        """DeepSeek's."""
        return {
            "num_key_value_heads": 4,
            "head_dim": self.rope,
            "q_lora_rank": self.latent // 4,
            "kv_lora_rank": self.latent,
            "qk_nope_head_dim": 2 * self.rope,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": 2 * self.rope,
        }


NARROW = Widths(hidden=32, intermediate=64, expert=32, head=8, linear_head=8, latent=64, rope=4)
# What vLLM 0.32's kernels for the CPU take: its latent attention has the published sizes.
WIDE = Widths(hidden=256, intermediate=512, expert=256, head=64, linear_head=128, latent=512, rope=64)

_PROJECTION = re.compile(r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<kind>gate|up|down)_proj\.weight$")

Tensors = dict[str, torch.Tensor]
Build = Callable[..., Path]


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


def _plain(class_name: str, config_name: str, **more: Any) -> Build:
    def build(folder: Path, widths: Widths = NARROW) -> Path:
        import transformers

        config = getattr(transformers, config_name)(**{**widths.common, **more})
        return _stored(folder, _saved(folder, class_name, config))

    return build


def _qwen3_moe(folder: Path, widths: Widths = NARROW) -> Path:
    return _plain("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **widths.experts)(folder, widths)


def _qwen3_next(folder: Path, widths: Widths = NARROW, *, fuse: bool = False) -> Path:
    """``fuse``: experts as transformers has them in memory, in the prediction layer too."""
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        **widths.common,
        **widths.linear_attention,
        **widths.experts,
        shared_expert_intermediate_size=widths.expert,
    )
    tensors = _saved(folder, "Qwen3NextForCausalLM", config)
    tensors |= _under_mtp(tensors, "model.layers.1.")
    return _stored(folder, fused(tensors) if fuse else tensors, num_nextn_predict_layers=1)


def _qwen3_5(folder: Path, widths: Widths = NARROW) -> Path:
    """Dense, text only."""
    from transformers import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**widths.common, **widths.linear_attention)
    tensors = _saved(folder, "Qwen3_5ForCausalLM", config)
    return _stored(folder, tensors | _under_mtp(tensors, "model.layers.1."), mtp_num_hidden_layers=1)


def _qwen3_5_moe(folder: Path, widths: Widths = NARROW) -> Path:
    """With a vision tower; experts fused, in the prediction layer too."""
    from transformers import Qwen3_5MoeConfig

    text = {
        **widths.common,
        **widths.linear_attention,
        **widths.experts,
        "shared_expert_intermediate_size": widths.expert,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 0, 0]},
    }
    tower = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": widths.hidden,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    }
    config = Qwen3_5MoeConfig(text_config=text, vision_config=tower, tie_word_embeddings=False)
    tensors = _saved(folder, "Qwen3_5MoeForConditionalGeneration", config)
    tensors = tensors | _under_mtp(tensors, "model.language_model.layers.1.")
    return _stored(folder, fused(tensors), mtp_num_hidden_layers=1)


def _with_block_behind(folder: Path, widths: Widths, class_name: str, config_name: str, **more: Any) -> Path:
    """The first layer dense, the second with experts, the third predicts."""
    import transformers

    settings = {**widths.common, **widths.experts, "n_routed_experts": 4, **more}
    del settings["num_experts"]
    groups = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    tensors = _saved(folder, class_name, getattr(transformers, config_name)(**settings, **groups))
    return _stored(folder, tensors | _behind_the_last(tensors, 2), num_nextn_predict_layers=1)


def _glm4_moe(folder: Path, widths: Widths = NARROW) -> Path:
    return _with_block_behind(folder, widths, "Glm4MoeForCausalLM", "Glm4MoeConfig")


def _deepseek_v3(folder: Path, widths: Widths = NARROW) -> Path:
    """With the keys that tell vLLM of the routers' corrections, as published."""
    more = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", **widths.latent_attention}
    return _with_block_behind(folder, widths, "DeepseekV3ForCausalLM", "DeepseekV3Config", **more)


# Name -> writes the model into a folder, narrow by default.
PUBLISHED: Mapping[str, Build] = {
    "mixtral": _plain("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "qwen3_next_fused": partial(_qwen3_next, fuse=True),
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "glm4_moe": _glm4_moe,
    "deepseek_v3": _deepseek_v3,
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
