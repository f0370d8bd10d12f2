"""Writes ``recipes/configs/NAME/{config.json,tensors.json}``: the headers of published models, no weights.

    python scripts/make_headers.py [OUTPUT_FOLDER]

Each model is built on the meta device from the dimensions that its publisher states, by transformers' own
modeling code; names are mapped back to those of a saved checkpoint. The parameter counts are checked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

LLAMA_4_SCOUT: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "text_config": {
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "output_router_logits": False,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1408,
        "image_size": 336,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "rope_theta": 10000,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 4096,
    },
}

LLAMA_3_3_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}

# folder -> (name for people, config.json, parameters of the published checkpoint)
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama-4-scout": ("meta-llama/Llama-4-Scout-17B-16E-Instruct", LLAMA_4_SCOUT, 108_641_793_536),
    "llama-3.3-70b": ("meta-llama/Llama-3.3-70B-Instruct", LLAMA_3_3_70B, 70_553_706_496),
}


def published_tensors(config: dict[str, Any]) -> list[tuple[str, str, list[int]]]:
    """(name, safetensors dtype, shape) of every tensor of the checkpoint, in the order of the modules."""
    loaded = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(loaded)
    names = revert_weight_conversion(model, model.state_dict())
    return [(name, "BF16", list(tensor.shape)) for name, tensor in names.items()]


def write(folder: Path, model: str, config: dict[str, Any], parameters: int) -> None:
    """Writes the two files of one model; one tensor a line, so that a change shows in a diff."""
    tensors = published_tensors(config)
    counted = sum(torch.Size(shape).numel() for _, _, shape in tensors)
    assert counted == parameters, f"{model}: {counted:,} parameters, published {parameters:,}"
    source = (
        f"{model}, written from its public layout by scripts/make_headers.py "
        f"with transformers {transformers.__version__}"
    )
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tensors.json").write_text(
        f'{{"source": {json.dumps(source)},\n"tensors": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    print(f"{folder}: {len(tensors)} tensors, {counted:,} parameters")


def main() -> None:
    """Writes every model into the folder given, or into ``recipes/configs`` of this repository."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "recipes" / "configs"
    for name, (model, config, parameters) in MODELS.items():
        write(root / name, model, config, parameters)


if __name__ == "__main__":
    main()
