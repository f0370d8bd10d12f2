"""Schemes that store scales of activations, from recipe to reloaded checkpoint: calibrated even with rtn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.errors import PlanError
from compressor.model.decode import StoredWeights
from compressor.model.families.naming import fuse_group
from compressor.progress import Silent
from compressor.report.manifest import check_manifest
from compressor.verify.models import check_source_values
from compressor.verify.structure import check_structure
from tests.tiny import tiny_llama, tiny_llama4

from .cases import write_recipe

SCALES = {"nvfp4": "input_global_scale", "fp8_static": "input_scale"}
DIALECTS = ("compressed-tensors", "modelopt")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and one with experts, of which short text leaves some without a token."""
    root = tmp_path_factory.mktemp("sources")
    return {
        "llama": tiny_llama(root / "llama", hidden=128, intermediate=128, heads=2, kv_heads=2),
        "llama4": tiny_llama4(
            root / "llama4",
            hidden=128,
            intermediate=128,
            heads=2,
            kv_heads=2,
            experts=8,
            moe_step=2,
            intermediate_dense=256,
        ),
    }


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Calibration and evaluation of a recipe, on two texts."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "shown.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    (folder / "measured.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    shown, measured = (json.dumps(str(folder / f"{name}.txt")) for name in ("shown", "measured"))
    return (
        f"calibration: {{datasets: [{{path: {shown}}}], num_samples: 2, sequence_length: 64}}\n"
        f"evaluate: {{text: {measured}, tokens: 128, context: 64}}\n"
    )


def _scales(folder: Path, local: str) -> dict[str, float]:
    """Module -> its stored scale of inputs, by compressed-tensors' name."""
    stored = StoredWeights(folder)
    return {module: float(stored.local(module)[local]) for module in stored.modules}


@pytest.mark.parametrize("model", ["llama", "llama4"])
@pytest.mark.parametrize("scheme", SCALES)
def test_static_inputs(scheme: str, model: str, tmp_path: Path, sources: dict[str, Path], rest: str) -> None:
    """Measured with rtn too, shared by what engines fuse, whole and right; both dialects measure alike."""
    found = {}
    for dialect in DIALECTS:
        text = f"{rest}export: {{format: {dialect}}}"
        recipe = write_recipe(tmp_path / f"{dialect}.yaml", sources[model], f"{{scheme: {scheme}}}", text)
        result = compressor.run(recipe, output=tmp_path / "out" / dialect)
        assert result.report.stages[0].name == "walk"
        source = FolderSource(sources[model])
        checks = check_structure(result.output, Silent()) + check_source_values(
            result.output, source, Silent()
        )
        assert [check for check in checks if check.status != "passed"] == []
        assert check_manifest(result.output) == []
        found[dialect] = (result.report.quality, _scales(result.output, SCALES[scheme]))
    quality, scales = found["compressed-tensors"]
    other_quality, other_scales = found["modelopt"]
    assert quality is not None
    assert other_quality is not None
    # Random weights: a scale that is upside down gives whole nats.
    assert 0 < quality.kl.mean < 0.25
    assert quality.kl == other_quality.kl
    assert quality.activations_simulated
    assert scales == other_scales
    shared: dict[str, set[float]] = {}
    for module, scale in scales.items():
        assert scheme == "fp8_static" or torch.tensor(scale).log2() % 1 == 0
        expert = ".experts." in module
        key = f"{module.rpartition('.experts.')[0]} {module[-9:]}" if expert else fuse_group(module) or module
        shared.setdefault(key, set()).add(scale)
    assert all(len(values) == 1 for values in shared.values())
    assert len(shared) < len(scales)


def test_ends_are_not_measured(tmp_path: Path, sources: dict[str, Path], rest: str) -> None:
    """The output head lies in no block, so nothing hears its inputs: said before the work."""
    weights = "{scheme: int8, rules: [{match: lm_head.weight, scheme: fp8_static}]}"
    recipe = write_recipe(tmp_path / "recipe.yaml", sources["llama"], weights, rest)
    with pytest.raises(PlanError, match=r"measured inside blocks only: lm_head\.weight"):
        compressor.plan(recipe, output=tmp_path / "out")
