"""Prediction layers that rules quantize: in the result as claimed, run from there, trained, written back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compressor
from compressor.checkpoint.dequantized import DequantizedSource
from compressor.checkpoint.folder import FolderSource
from compressor.drafts.native import NativeHead
from compressor.drafts.native_layer import PredictionLayer
from compressor.drafts.native_table import prediction_names
from compressor.errors import PlanError
from compressor.model.load import load_checkpoint_model, load_source_model
from compressor.stages.predictions import stored_predictions
from tests.model.published import PUBLISHED

from .cases import write_recipe

RULED = {
    "qwen3_next": "mtp.layers.*_proj",
    "qwen3_5_moe": "mtp.layers.*_proj",
    "glm4_moe": "model.layers.2.*_proj",
}
# Left out of the pattern above: engines keep it in 16 bit whatever the config says (vLLM 0.32: nn.Linear).
PROJECTION = {"qwen3_next": "mtp.fc", "qwen3_5_moe": "mtp.fc", "glm4_moe": "model.layers.2.eh_proj"}


def ruled(family: str, folder: Path, scheme: str = "nvfp4a16", solver: str = "rtn") -> Path:
    """A recipe that quantizes the model, and its prediction layer by a rule."""
    model = PUBLISHED[family](folder / "model")
    ignored = ", ignore: ['*.eh_proj']" if family == "glm4_moe" else ""
    rules = f"[{{match: '{RULED[family]}', scheme: {scheme}, solver: {solver}}}]"
    weights = f"{{scheme: nvfp4a16{ignored}, rules: {rules}}}"
    rest = "evaluate: null\nexport: {max_shard_bytes: 40KB}"
    return write_recipe(folder / "recipe.yaml", model, weights, rest)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def ignored(module: str, config: dict[str, Any]) -> bool:
    """As vLLM and compressed-tensors match entries."""
    return any(
        bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module
        for entry in config["quantization_config"]["ignore"]
    )


@pytest.mark.parametrize("family", RULED)
def test_quantized_layers_run_and_are_written_back(family: str, tmp_path: Path) -> None:
    """By name as vLLM asks for them; decoded they are near the source's; trained values take their place."""
    recipe = ruled(family, tmp_path)
    result = compressor.run(recipe, output=tmp_path / "out").output
    source = FolderSource(tmp_path / "model")
    names = set(prediction_names(source.headers, source.config))
    config = json.loads((result / "config.json").read_text())
    before = stored(result)
    packed = {name.removesuffix(".weight_packed") for name in before if name.endswith("_packed")}
    own = {module for module in packed if module.startswith(RULED[family].partition("*")[0])}
    assert own
    assert not any(ignored(module, config) for module in packed)
    assert ignored(PROJECTION[family], config)
    assert f"{PROJECTION[family]}.weight" in before
    index = json.loads((result / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == before.keys()

    decoded = DequantizedSource(FolderSource(result, quantized=True))
    assert names <= decoded.headers.keys() | {name for name in names if ".experts." in name}
    target = load_source_model(source, torch.float32)
    layer = PredictionLayer(decoded, target)
    plain = PredictionLayer(source, target)
    for name, parameter in layer.named_parameters():
        wanted = plain.get_parameter(name)
        # NVFP4 of Gaussian values is off by about a tenth.
        assert float((parameter - wanted).norm()) < 0.15 * float(wanted.norm()), name

    plan = compressor.plan(recipe, output=tmp_path / "out")
    head = NativeHead(plain, lambda made: stored_predictions(source, made, plan.claims, plan.dialect))
    head.write(result, 3)
    assert same(stored(result), before)  # untrained: what the run wrote
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(-2)
    head.write(result, 3)
    after = stored(result)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {f"{module}.weight_packed" for module in own} <= changed
    assert f"{PROJECTION[family]}.weight" in changed
    prefix = RULED[family].partition(".")[0] if family != "glm4_moe" else "model.layers.2."
    assert all(name.startswith(prefix) for name in changed)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize(("scheme", "solver"), [("nvfp4", "rtn"), ("nvfp4a16", "gptq")])
def test_what_needs_data_is_refused(scheme: str, solver: str, tmp_path: Path) -> None:
    """Ranges of inputs and moments are heard in the model, which has no prediction layer."""
    with pytest.raises(PlanError, match="without calibration"):
        compressor.plan(ruled("qwen3_next", tmp_path, scheme, solver), output=tmp_path / "out")


def test_a_target_read_back_from_disk_is_predicted_for(tmp_path: Path) -> None:
    """The layer as the result carries it, bit for bit, on the quantized target."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        PUBLISHED["qwen3_next"](tmp_path / "model"),
        "{scheme: nvfp4a16}",
        "evaluate: null",
    )
    result = compressor.run(recipe, output=tmp_path / "out").output
    source = FolderSource(tmp_path / "model")
    target = load_checkpoint_model(result, torch.float32).model
    layer = PredictionLayer(DequantizedSource(FolderSource(result, quantized=True)), target)
    wanted = PredictionLayer(source, load_source_model(source, torch.float32)).tensors()
    assert same(layer.tensors(), wanted)


def test_what_stays_compressed_is_not_trained(tmp_path: Path) -> None:
    """Told by the plan, before anything is computed; what is only measured may stay."""
    result = compressor.run(ruled("qwen3_next", tmp_path), output=tmp_path / "out").output
    recipe = tmp_path / "again.yaml"
    recipe.write_text(
        f"model: {{source: {json.dumps(str(result))}, from: keep}}\nweights: {{scheme: nvfp4a16}}\n"
        "evaluate: null\ndrafts: {kind: native, train: {}}\n"
    )
    with pytest.raises(PlanError, match="stays as the source compresses it: it cannot be trained"):
        compressor.plan(recipe, output=tmp_path / "two")
