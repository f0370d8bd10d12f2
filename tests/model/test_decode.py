"""Quantized folders read tensor by tensor, in both dialects: every format, and what must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.modelopt import algorithm_for, to_modelopt
from compressor.errors import CheckpointError
from compressor.model.decode import StoredWeights
from compressor.model.load import load_checkpoint_model
from tests.model.compressed import FORMATS, compress_folder
from tests.tiny import tiny_llama, tiny_llama4

# compressed-tensors decodes 4-bit floats to bfloat16: 8 significant bits. ModelOpt's second scale is a
# reciprocal, which costs a rounding in fp32 more.
BF16 = 2.0**-8
FP32 = 2.0**-22
IN_BOTH = ["NVFP4A16", "NVFP4", "FP8_DYNAMIC", "FP8_BLOCK", "FP8"]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _respell(folder: Path, preset: str, **quantization: Any) -> None:
    """Turns a compressed-tensors folder into one of ModelOpt's, described by hf_quant_config.json alone."""
    algorithm = algorithm_for(preset)
    assert algorithm is not None
    stored = load_file(folder / "model.safetensors")
    for module in [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]:
        local = {name: stored.pop(name) for name in list(stored) if name.startswith(f"{module}.")}
        spelled = to_modelopt(algorithm, {name.removeprefix(f"{module}."): local[name] for name in local})
        stored |= {f"{module}.{name}": tensor.contiguous() for name, tensor in spelled.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    _edit(folder / "config.json", lambda config: config.pop("quantization_config"))
    described = {"quant_algo": algorithm.name, "exclude_modules": ["lm_head"]} | quantization
    text = json.dumps({"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": described})
    (folder / "hf_quant_config.json").write_text(text)


def _folder(tmp_path: Path, preset: str) -> tuple[Path, dict[str, torch.Tensor]]:
    source = tiny_llama(tmp_path / "source", hidden=128, intermediate=256)
    return tmp_path / "result", compress_folder(source, tmp_path / "result", preset)


@pytest.mark.parametrize("preset", FORMATS)
def test_every_format_decodes_to_what_it_means(preset: str, tmp_path: Path) -> None:
    """Codes times scales, computed apart in float64; the rest is as it lies."""
    folder, meant = _folder(tmp_path, preset)
    stored = StoredWeights(folder)
    assert stored.dialect == "compressed-tensors"
    assert stored.modules == tuple(sorted(name.removesuffix(".weight") for name in meant))
    for module in stored.modules:
        decoded = stored.weight(module)
        assert decoded.dtype is torch.float32
        tolerance = BF16 if "FP4" in preset else FP32
        torch.testing.assert_close(decoded.double(), meant[f"{module}.weight"], rtol=tolerance, atol=0)
        assert str(stored.scheme(module).format) == json.loads((folder / "config.json").read_text())[
            "quantization_config"]["format"]  # fmt: skip
    assert stored.stored("model.norm.weight").dtype is torch.bfloat16
    assert stored.names == frozenset(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("preset", IN_BOTH)
def test_modelopt_folders_decode_and_load(preset: str, tmp_path: Path) -> None:
    """Tensor by tensor, and as a model whose activations are rounded as in the first dialect."""
    folder, meant = _folder(tmp_path, preset)
    first = load_checkpoint_model(folder, torch.float32)
    _respell(folder, preset)
    stored = StoredWeights(folder)
    assert stored.dialect == "modelopt"
    assert len(stored.modules) == 14
    for module in stored.modules:
        tolerance = BF16 if "FP4" in preset else FP32
        torch.testing.assert_close(
            stored.weight(module).double(), meant[f"{module}.weight"], rtol=tolerance, atol=0
        )
    second = load_checkpoint_model(folder, torch.float32)
    assert (second.via, second.activations_simulated) == (first.via, first.activations_simulated)
    tokens = torch.arange(32)[None]
    assert torch.equal(first.model(tokens).logits, second.model(tokens).logits)


def test_a_tied_head_is_not_taken_for_quantized(tmp_path: Path) -> None:
    """It has no tensor, and is a linear layer all the same."""
    source = tiny_llama(tmp_path / "source", hidden=64, tie=True)
    compress_folder(source, tmp_path / "result", "NVFP4A16")
    _respell(tmp_path / "result", "NVFP4A16")
    model = load_checkpoint_model(tmp_path / "result", torch.float32).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_mixture_decodes_module_by_module(tmp_path: Path) -> None:
    """Each by the algorithm that quantized_layers names."""
    folder, meant = _folder(tmp_path, "FP8_DYNAMIC")
    layers = {name.removesuffix(".weight"): {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"} for name in meant}
    _respell(folder, "FP8_DYNAMIC", quant_algo="MIXED_PRECISION", quantized_layers=layers)
    torch.testing.assert_close(
        StoredWeights(folder).weight(Q_PROJ).double(), meant[f"{Q_PROJ}.weight"], rtol=FP32, atol=0
    )
    del layers[Q_PROJ]
    _edit(folder / "hf_quant_config.json", lambda c: c["quantization"].update(quantized_layers=layers))
    with pytest.raises(CheckpointError, match="quantized_layers does not name it"):
        StoredWeights(folder).weight(Q_PROJ)


def test_scales_in_16_bit_decode_in_float32(tmp_path: Path) -> None:
    """Decoded in the scale's own dtype, an FP8 weight would lose bits."""
    folder, _ = _folder(tmp_path, "FP8_DYNAMIC")
    stored = load_file(folder / "model.safetensors")
    scale_O1 = stored[f"{Q_PROJ}.weight_scale"].bfloat16()
    stored[f"{Q_PROJ}.weight_scale"] = scale_O1
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    expected = stored[f"{Q_PROJ}.weight"].float() * scale_O1.float()
    assert torch.equal(StoredWeights(folder).weight(Q_PROJ), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("quantization_config"), "neither config.json nor hf_quant_config.json"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "quantized with 'gptq'"),
        (lambda c: c["quantization_config"].update(config_groups=[1]), "not compressed-tensors'"),
        (lambda c: c["quantization_config"]["config_groups"]["group_0"].update(format="marlin-24"), "read"),
        (lambda c: c["quantization_config"].update(ignore=[r"re:.*q_proj"]), "no group .* claims it"),
    ],
)
def test_configs_that_say_too_little(
    change: Callable[[dict[str, Any]], Any], reason: str, tmp_path: Path
) -> None:
    """No quantization, another one, and modules that nothing describes."""
    folder, _ = _folder(tmp_path, "NVFP4A16")
    _edit(folder / "config.json", change)
    with pytest.raises(CheckpointError, match=reason):
        StoredWeights(folder).weight(Q_PROJ)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_missing_and_misfitting_tensors_are_named(dialect: str, tmp_path: Path) -> None:
    """A scale of another matrix, and a matrix without one of its tensors."""
    folder, _ = _folder(tmp_path, "FP8_BLOCK")
    if dialect == "modelopt":
        _respell(folder, "FP8_BLOCK")
    whole = load_file(folder / "model.safetensors")
    swapped = whole | {f"{Q_PROJ}.weight_scale": torch.ones(7, 5)}
    save_file(swapped, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit together") as caught:
        StoredWeights(folder).weight(Q_PROJ)
    assert caught.value.where == Q_PROJ
    assert "\n" not in caught.value.what
    del whole[f"{Q_PROJ}.weight"]
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}\.weight is missing"):
        StoredWeights(folder).weight(Q_PROJ)


def test_experts_quantized_in_one_tensor_are_refused(tmp_path: Path) -> None:
    """ModelOpt's Llama 4: their scales lie beside them under names of their own, and would go unseen."""
    source = tiny_llama4(tmp_path, hidden=32, intermediate=64, experts=2, layers=1)
    stored = load_file(source / "model.safetensors")
    name = "model.layers.0.feed_forward.experts.down_proj_weight_scale"
    save_file(stored | {name: torch.ones(2, 4, 32)}, source / "model.safetensors")
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A16_NVFP4"}}))
    with pytest.raises(CheckpointError, match=rf"in one tensor are not read: {name}"):
        StoredWeights(source)
