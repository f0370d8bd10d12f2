"""Language models with a vision tower, from end to end: towers stay, text and images give the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.model.decode import StoredWeights, fused_tensors
from compressor.model.load import load_checkpoint_model
from compressor.progress import Silent
from tests.model.wrappers import WRAPPERS, image_prompt

from .cases import write_recipe
from .decoded import logits, reference

TOWERS = ("vision", "visual", "multi_modal_projector")
SCHEMES = {
    "one": "{scheme: nvfp4a16}",
    "two": "{scheme: nvfp4a16, rules: [{match: 're:(language_)?model\\..*self_attn\\.[qkvo]_proj$', "
    "scheme: {kind: int4, group_size: 32}}]}",
}
TEXT = {"input_ids": torch.arange(3, 40)[None]}
# How vLLM 0.32 renames what a checkpoint calls its modules (hf_to_vllm_mapper of model_executor/models/
# gemma3_mm.py, mistral3.py, qwen2_vl.py, qwen3_vl.py); its mllama4.py renames none.
_SINCE_4_52 = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
VLLM: dict[str, dict[str, str]] = {
    "gemma3_with_tower": _SINCE_4_52,
    "mistral3": _SINCE_4_52 | {"model.": "language_model.model."},
    "qwen2_5_vl": {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    },
    "qwen3_vl": {
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
    },
    "llama4_with_tower": {},
}


def renamed(name: str, prefixes: dict[str, str]) -> str:
    """vLLM's ``WeightsMapper``: each prefix in turn, on what the ones before made of the name."""
    for old, new in prefixes.items():
        if name.startswith(old):
            name = name.replace(old, new, 1)
    return name


def check_names(
    config: dict[str, Any], weights: StoredWeights, linear: set[str], prefixes: dict[str, str]
) -> None:
    """As vLLM renames and matches them, exactly the quantized modules are quantized."""
    ignored = {renamed(name, prefixes) for name in config["ignore"]}
    targets = {
        renamed(name, prefixes) for group in config["config_groups"].values() for name in group["targets"]
    }
    for module in linear | set(weights.modules):
        name = renamed(module, prefixes)
        is_quantized = name not in ignored and bool(targets & {"Linear", name})
        assert is_quantized == (module in weights.modules), module


@pytest.mark.filterwarnings("ignore:.*ComplexHalf|.*complex:UserWarning")
@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("name", WRAPPERS)
def test_towers_stay_and_logits_are_the_references(name: str, schemes: str, tmp_path: Path) -> None:
    """What transformers loads equals the source with our own decoded weights, for text and for an image."""
    source = WRAPPERS[name](tmp_path / "source")
    recipe = write_recipe(tmp_path / "recipe.yaml", source, SCHEMES[schemes], "evaluate: null")
    folder = compressor.run(recipe, output=tmp_path / "out", progress=Silent()).output
    weights, before = StoredWeights(folder), load_file(source / "model.safetensors")
    after = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    towers = [key for key in before if any(word in key for word in TOWERS)]
    assert len(towers) > 10
    assert all(torch.equal(after[key], before[key]) for key in towers)
    linear = {
        key.removesuffix(".weight") for key in towers if key.endswith(".weight") and before[key].ndim == 2
    }
    config, described = AutoConfig.from_pretrained(source), AutoConfig.from_pretrained(folder)
    check_names(described.quantization_config, weights, linear, VLLM[name])

    wrapper = AutoModelForImageTextToText._model_mapping[type(config)]
    kept = reference(before, after, weights)
    expected = wrapper.from_pretrained(None, config=config, state_dict=kept, dtype=torch.float32)
    text = load_checkpoint_model(folder, torch.float32, fused=fused_tensors(FolderSource(source)))
    torch.testing.assert_close(logits(text.model, TEXT), logits(expected, TEXT))
    if name == "llama4_with_tower":
        return  # transformers reads its experts in one tensor only
    described.quantization_config["dequantize"] = True
    loaded = wrapper.from_pretrained(folder, config=described, dtype=torch.float32)
    prompt = image_prompt(name)
    torch.testing.assert_close(logits(loaded, prompt), logits(expected, prompt))
    other = {**prompt, "pixel_values": -prompt["pixel_values"]}
    assert not torch.allclose(logits(loaded, other), logits(expected, prompt))
