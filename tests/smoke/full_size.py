"""Headers of models of full size, without weights, as transformers would save them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def write_headers(
    folder: Path,
    raw: Mapping[str, Any],
    extra: Mapping[str, tuple[int, ...]] | None = None,
    *,
    predicts: bool = False,
) -> Path:
    """Writes ``config.json`` and ``tensors.json`` (``model.headers`` of a recipe) and returns the folder.

    ``predicts``: with the prediction layer that the published model has, one more of the last block.
    """
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    with warnings.catch_warnings(), torch.device("meta"), torch.no_grad():
        warnings.simplefilter("ignore")
        model = getattr(transformers, raw["architectures"][0])(config)
        saved = revert_weight_conversion(model, model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()} | dict(extra or {})
    if predicts:
        shapes |= _prediction_layer(shapes, config.get_text_config().num_hidden_layers)
    for tied in model.all_tied_weights_keys:
        shapes.pop(tied, None)
    tensors = [[name, "BF16", list(shape)] for name, shape in shapes.items()]
    (folder / "tensors.json").write_text(json.dumps({"source": "made by a test", "tensors": tensors}))
    return folder


def _prediction_layer(shapes: Mapping[str, tuple[int, ...]], blocks: int) -> dict[str, tuple[int, ...]]:
    """``mtp.*`` where the model has linear attention, as Qwen's do; else the block ``blocks``."""
    (embedding,) = (name for name in shapes if name.endswith(".embed_tokens.weight"))
    vocabulary, hidden = shapes[embedding]
    layers = embedding.replace("embed_tokens.weight", "layers.")
    if any(".linear_attn." in name for name in shapes):
        block, norms = "mtp.layers.0.", ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
        found = {"mtp.fc.weight": (hidden, 2 * hidden), **{f"mtp.{norm}.weight": (hidden,) for norm in norms}}
    else:
        block, norms = f"{layers}{blocks}.", ("enorm", "hnorm", "shared_head.norm")
        found = {f"{block}eh_proj.weight": (hidden, 2 * hidden)}
        found |= {f"{block}{norm}.weight": (hidden,) for norm in norms}
        ends = ("embed_tokens", "shared_head.head")
        found |= {f"{block}{end}.weight": (vocabulary, hidden) for end in ends}
    last = f"{layers}{blocks - 1}."
    return found | {
        name.replace(last, block): shape for name, shape in shapes.items() if name.startswith(last)
    }


def _of(model: str, config: str, **more: Any) -> Callable[[], dict[str, Any]]:
    def raw() -> dict[str, Any]:
        import transformers

        made = getattr(transformers, config)(**more)
        return {**made.to_diff_dict(), "model_type": made.model_type, "architectures": [model]}

    return raw


def shipped(name: str) -> dict[str, Any]:
    """A config.json of ``recipes/configs``."""
    root = Path(__file__).resolve().parents[2] / "recipes" / "configs" / name
    loaded: dict[str, Any] = json.loads((root / "config.json").read_text())
    return loaded


# With the sizes that the config classes have by default, which are those of a published model.
CONFIGS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "llama": lambda: shipped("llama-3.3-70b"),
    "llama4": lambda: shipped("llama-4-scout"),
    "maverick_text": _of(
        "Llama4ForCausalLM", "Llama4TextConfig", interleave_moe_layer_step=2, num_local_experts=128
    ),
    "mixtral": _of("MixtralForCausalLM", "MixtralConfig"),
    "qwen3_moe": _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig"),
    "qwen3_next": _of("Qwen3NextForCausalLM", "Qwen3NextConfig", num_experts=64),
    "qwen3_5_moe": _of("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig"),
    "jamba": _of("JambaForCausalLM", "JambaConfig", use_mamba_kernels=False),
    "deepseek_v3": _of("DeepseekV3ForCausalLM", "DeepseekV3Config", num_hidden_layers=12),
    "glm4_moe": _of(
        "Glm4MoeForCausalLM", "Glm4MoeConfig", num_hidden_layers=12, hidden_size=5120, head_dim=128
    ),
    "gemma3": _of("Gemma3ForConditionalGeneration", "Gemma3Config"),
    "gpt_oss": _of("GptOssForCausalLM", "GptOssConfig"),
    "nemotron_h": _of("NemotronHForCausalLM", "NemotronHConfig"),
    "qwen2": _of("Qwen2ForCausalLM", "Qwen2Config"),
    "phi3": _of("Phi3ForCausalLM", "Phi3Config"),
}
