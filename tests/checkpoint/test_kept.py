"""What is kept of a compressed source: the stored tensors and the scheme, as its own config describes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.kept import KeptSource
from compressor.checkpoint.sources import open_source
from compressor.errors import CheckpointError
from tests.model.compressed import FORMATS, compress_folder
from tests.tiny import tiny_llama

Q_PROJ = "model.layers.0.self_attn.q_proj"
# W8A16 is a preset of groups, but made by hand with a scale for each row.
PRESETS = [preset for preset in FORMATS if preset != "W8A16"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_format(preset: str, tmp_path: Path) -> None:
    """All tensors of a matrix with their bits, the group of the config but for its targets, a name for it."""
    from compressed_tensors.quantization import preset_name_to_scheme

    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    compress_folder(plain, tmp_path / "packed", preset)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    source = open_source(str(tmp_path / "packed"), from_="keep")
    assert isinstance(source, KeptSource)
    assert len(source.kept) == 7
    kept = source.kept[f"{Q_PROJ}.weight"]
    found = source.stored(f"{Q_PROJ}.weight")
    assert found.keys() == {name for name in stored if name.startswith(f"{Q_PROJ}.")}
    assert list(found) == [header.name for header in kept.outputs]
    for header in kept.outputs:
        tensor = found[header.name]
        assert (tensor.dtype, tuple(tensor.shape)) == (stored[header.name].dtype, header.shape)
        assert torch.equal(tensor.view(-1).view(torch.uint8), stored[header.name].view(-1).view(torch.uint8))
    size = " g32" if preset.startswith("W4A16") else ""
    assert kept.scheme.label == f"{preset}{size} (kept)"
    described = kept.scheme.ct_scheme(["a", "b"])
    assert described.targets == ["a", "b"]
    assert described.weights is not None
    args = preset_name_to_scheme(preset, []).weights
    assert args is not None
    assert (described.weights.num_bits, described.weights.type) == (args.num_bits, args.type)


def test_only_scales_are_looked_at_for_nan(tmp_path: Path) -> None:
    """Two codes of FP4 in a byte may be 255, what scales of 8 bits say NaN with."""
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {"targets": ["Linear"], "weights": weights, "format": "nvfp4-pack-quantized"}
    described = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
    config = {"model_type": "llama", "quantization_config": described}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        "upscale.weight_packed": torch.full((16, 16), 255).byte(),
        "upscale.weight_scale": torch.ones(16, 2).to(torch.float8_e4m3fn),
        "upscale.weight_global_scale": torch.ones(1),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path), from_="keep")
    assert isinstance(source, KeptSource)
    assert source.stored("upscale.weight").keys() == tensors.keys()


def test_modelopt_is_refused(tmp_path: Path) -> None:
    """Its tensors have other names and shapes than a compressed-tensors result can describe."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    scales = {f"a.{name}": torch.tensor(0.5) for name in ("weight_scale", "input_scale")}
    codes = {"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}
    save_file(codes | scales, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)this source is ModelOpt FP8.*model.from: dequantize"):
        open_source(str(tmp_path), from_="keep")


def test_a_quantized_kv_cache_is_refused(tmp_path: Path) -> None:
    """What engines would do with the cache is not lost without a word."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=192, layers=1)
    compress_folder(plain, tmp_path / "packed", PRESETS[0])
    place = tmp_path / "packed" / "config.json"
    config = json.loads(place.read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    place.write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"(?s)does not carry a kv_cache_scheme.*model.from: dequantize"
    ):
        open_source(str(tmp_path / "packed"), from_="keep")
