"""Families that are not plain decoders, calibrated: what is loaded back has the decoded weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.model.architecture import model_class
from compressor.model.decode import StoredWeights, fused_tensors
from compressor.model.load import load_checkpoint_model
from compressor.progress import Silent
from tests.model.zoo import FAMILIES

from .cases import write_recipe
from .decoded import logits, reference

TEXT = "Five wizards quickly jump over my boxed vintage. " * 40
SHOWN = "num_samples: 6, sequence_length: 64"
# Modules that are quantized; what stays, among others.
QUANTIZED = {
    "gemma3_with_tower": ("self_attn.q_proj", "mlp.down_proj"),
    "qwen3_vl": ("self_attn.q_proj", "mlp.down_proj"),
    "gpt_oss": ("self_attn.q_proj", "self_attn.o_proj"),
    "deepseek_v4": ("attn.wkv", "attn.wo_b", "ffn.experts.3.w2", "ffn.shared_experts.w1"),
}
LEFT = {
    "gemma3_with_tower": ("vision_tower", "multi_modal_projector"),
    "qwen3_vl": ("visual",),
    "gpt_oss": ("experts", "router", "sinks"),
    "deepseek_v4": ("indexer", "compressor", "wo_a", "gate", "hc_"),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_logits_are_the_references(name: str, tmp_path: Path) -> None:
    """Every block is calibrated; the rest is the source's, bit for bit; text gives the reference's logits."""
    source = FAMILIES[name](tmp_path / "source")
    (tmp_path / "shown.txt").write_text(TEXT)
    shown = json.dumps(str(tmp_path / "shown.txt"))
    rest = f"calibration: {{datasets: [{{path: {shown}}}], {SHOWN}}}\nevaluate: null"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: int8, solver: gptq}", rest)
    done = compressor.run(recipe, output=tmp_path / "out", progress=Silent())
    weights, before = StoredWeights(done.output), load_file(source / "model.safetensors")
    files = done.output.glob("*.safetensors")
    after = {key: tensor for file in files for key, tensor in load_file(file).items()}
    for words in QUANTIZED[name]:
        assert any(module.endswith(words) for module in weights.modules)
    for words in LEFT[name]:
        kept = [key for key in before if words in key and not key.endswith("_proj.weight")]
        assert kept
        assert all(torch.equal(after[key], before[key]) for key in kept)
    assert done.report.calibration is not None
    calibrated = {matrix.name for matrix in done.report.calibration.matrices}
    assert calibrated == set(weights.modules)

    chosen, config = model_class(AutoConfig.from_pretrained(source))
    kept_tensors = reference(before, after, weights)
    expected = chosen.from_pretrained(None, config=config, state_dict=kept_tensors, dtype=torch.float32)
    loaded = load_checkpoint_model(done.output, torch.float32, fused=fused_tensors(FolderSource(source)))
    prompt = {"input_ids": torch.arange(3, 40)[None]}
    torch.testing.assert_close(logits(loaded.model, prompt), logits(expected, prompt))
