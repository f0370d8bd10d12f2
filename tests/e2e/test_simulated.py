"""Activations rounded in decoded models as in those that transformers' own loader makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.model import load
from compressor.model.decode import fused_tensors
from compressor.model.load import LoadedCheckpoint, load_checkpoint_model
from compressor.stages.simulated import simulate_activations
from tests.tiny import tiny_llama, tiny_llama4

from .cases import write_recipe

IDS = torch.arange(48).view(2, 24) * 7 % 90
SCHEMES = ["nvfp4", "fp8_static", "fp8_dynamic", "{kind: int8, activations: dynamic}"]


def _made(tmp_path: Path, folder: Path, weights: str) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    shown = f"calibration: {{datasets: [{{path: '{text}'}}], num_samples: 4, sequence_length: 32}}"
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, weights, f"{shown}\nevaluate: null\n")
    return compressor.run(recipe, output=tmp_path / "out" / "made").output


def _loaded(made: Path, source: FolderSource) -> LoadedCheckpoint:
    return load_checkpoint_model(made, torch.float32, fused=fused_tensors(source))


def _logits(loaded: LoadedCheckpoint) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = loaded.model(IDS).logits
    return logits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_as_transformers_does(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense model, loaded by transformers and decoded: equal but for the order of sums."""
    folder = tiny_llama(tmp_path / "llama", hidden=128, intermediate=128, heads=2, kv_heads=2)
    made, source = _made(tmp_path, folder, f"{{scheme: {scheme}}}"), FolderSource(folder)
    theirs = _loaded(made, source)
    assert (theirs.via, theirs.activations_simulated) == ("transformers", True)
    assert simulate_activations(theirs, made, source) is theirs
    monkeypatch.setattr(load, "EXPERT", re.compile("proj"))  # as if all were experts
    decoded = _loaded(made, source)
    assert (decoded.via, decoded.activations_simulated) == ("decoded", False)
    plain, expected = _logits(decoded), _logits(theirs)
    ours = simulate_activations(decoded, made, source)
    assert ours.activations_simulated
    # fp32 sums of 128 terms; without rounding the distance is a hundred times as large at least
    distance = float((_logits(ours) - expected).abs().max())
    assert distance < 1e-5
    assert float((plain - expected).abs().max()) > 100 * distance


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_dynamic"])
def test_experts(scheme: str, tmp_path: Path) -> None:
    """Inputs of experts are rounded; where one expert alone is not quantized, nothing is said to be."""
    folder = tiny_llama4(tmp_path / "llama4", hidden=128, intermediate=128, heads=2, kv_heads=2)
    source = FolderSource(folder)
    made = _made(tmp_path, folder, f"{{scheme: {scheme}}}")
    decoded = _loaded(made, source)
    assert (decoded.via, decoded.activations_simulated) == ("decoded", False)
    plain = _logits(decoded)
    attention_only = [name for name, _ in decoded.model.named_modules() if name.endswith("_proj")]
    rounded = simulate_activations(decoded, made, source)
    assert rounded.activations_simulated
    both = _logits(rounded)
    assert not torch.equal(both, plain)
    for name in attention_only:
        rounded.model.get_submodule(name)._forward_pre_hooks.clear()
    of_experts = _logits(rounded)
    assert not torch.equal(of_experts, plain)
    assert not torch.equal(of_experts, both)


@pytest.mark.parametrize(
    ("scheme", "local"), [("nvfp4", "input_global_scale"), ("fp8_static", "input_scale")]
)
def test_experts_of_several_ranges(scheme: str, local: str, tmp_path: Path) -> None:
    """As other tools write them: all of a layer's experts share the largest, so that ours is the result."""
    folder = tiny_llama4(tmp_path / "llama4", hidden=128, intermediate=128, heads=2, kv_heads=2)
    source = FolderSource(folder)
    made = _made(tmp_path, folder, f"{{scheme: {scheme}}}")
    expected = _logits(simulate_activations(_loaded(made, source), made, source))
    file = made / "model.safetensors"
    tensors = load_file(file)
    narrower = 2.0 if scheme == "nvfp4" else 0.5
    changed = [name for name in tensors if f".experts.1.down_proj.{local}" in name]
    assert changed
    for name in changed:
        tensors[name] *= narrower
    save_file(tensors, file)
    rounded = simulate_activations(_loaded(made, source), made, source)
    assert rounded.activations_simulated
    assert torch.equal(_logits(rounded), expected)


def test_not_told_of_all(tmp_path: Path) -> None:
    """The output head lies in no block: the model stays as it was loaded, and says so."""
    folder = tiny_llama4(tmp_path / "llama4", hidden=128, intermediate=128, heads=2, kv_heads=2)
    source = FolderSource(folder)
    rules = "rules: [{match: lm_head.weight, scheme: fp8_dynamic}]"
    made = _made(tmp_path, folder, f"{{scheme: fp8_dynamic, {rules}}}")
    decoded = _loaded(made, source)
    before = _logits(decoded)
    assert simulate_activations(decoded, made, source) is decoded
    assert torch.equal(_logits(decoded), before)
