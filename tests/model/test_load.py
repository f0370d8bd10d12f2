"""Whole models: sources, compressed folders of every format, and what must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GgufConfig

from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.gguf import GgufSource
from compressor.errors import CheckpointError
from compressor.model.decode import StoredWeights
from compressor.model.families.llama4 import LLAMA4
from compressor.model.load import load_checkpoint_model, load_source_model, load_tokenizer, set_dtype
from compressor.model.quiet import quiet
from compressor.schemes import parse_scheme
from tests.checkpoint.tiny_gguf import tiny_gguf
from tests.model.compressed import FORMATS, compress_folder, fp8, nvfp4, write_quantization_config
from tests.tiny import tiny_llama, tiny_llama4

# compressed-tensors decodes 4-bit floats to bfloat16: 8 significant bits.
BF16 = 2.0**-8
FP32 = 2.0**-22
ACTIVATIONS = {"NVFP4", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "FP8"}


@pytest.mark.parametrize("preset", FORMATS)
def test_decoded_weights_are_what_the_format_says(preset: str, tmp_path: Path) -> None:
    """Every format's weights come back as codes times scales, computed here in float64."""
    source = tiny_llama(tmp_path / "source", hidden=128, intermediate=192)
    meant = compress_folder(source, tmp_path / "result", preset)
    loaded = load_checkpoint_model(tmp_path / "result", torch.float32)
    parameters = dict(loaded.model.named_parameters())
    assert len(meant) == 14
    for name, weight in meant.items():
        assert parameters[name].dtype is torch.float32
        tolerance = BF16 if "FP4" in preset else FP32
        torch.testing.assert_close(parameters[name].double(), weight, rtol=tolerance, atol=0)
    assert loaded.via == "transformers"
    assert loaded.activations_simulated is (True if preset in ACTIVATIONS else None)


@pytest.mark.parametrize(("preset", "largest"), [("W8A8", 127.5), ("FP8_DYNAMIC", 448.0)])
def test_dynamic_activations_are_quantized_in_forward(preset: str, largest: float, tmp_path: Path) -> None:
    """A linear layer computes with its input rounded to 8 bits, one scale for each token."""
    source = tiny_llama(tmp_path / "source", hidden=64)
    compress_folder(source, tmp_path / "result", preset)
    layer = load_checkpoint_model(tmp_path / "result", torch.float32).model.get_submodule(
        "model.layers.0.self_attn.q_proj"
    )
    x_BTI = torch.randn(2, 5, 64)
    scale_BT1 = x_BTI.abs().amax(-1, keepdim=True) / largest
    scaled = x_BTI / scale_BT1
    codes = scaled.round().clamp(-128, 127) if preset == "W8A8" else scaled.to(torch.float8_e4m3fn).float()
    expected = codes * scale_BT1 @ layer.weight.T
    torch.testing.assert_close(layer(x_BTI), expected, rtol=1e-5, atol=1e-5)
    assert (layer(x_BTI) - x_BTI @ layer.weight.T).abs().max() > 1e-3


@pytest.mark.parametrize(("preset", "kind"), [("NVFP4", "nvfp4"), ("FP8", "fp8_static")])
def test_stored_scales_of_activations_are_used_in_forward(preset: str, kind: str, tmp_path: Path) -> None:
    """A linear layer computes with its input rounded as the scheme says."""
    source = tiny_llama(tmp_path / "source", hidden=64)
    compress_folder(source, tmp_path / "result", preset)
    name = "model.layers.0.self_attn.q_proj"
    layer = load_checkpoint_model(tmp_path / "result", torch.float32).model.get_submodule(name)
    stored = StoredWeights(tmp_path / "result").local(name)
    x_NI = torch.randn(5, 64)
    expected = parse_scheme(kind).round_inputs(x_NI, stored) @ layer.weight.T
    torch.testing.assert_close(layer(x_NI[None])[0], expected, rtol=1e-5, atol=1e-5)
    assert (expected - x_NI @ layer.weight.T).abs().max() > 1e-3


def _experts(source: Path) -> list[tuple[str, Any]]:
    """The fused tensors of a Llama 4 folder and their parts."""
    opened = FolderSource(source)
    family = LLAMA4
    roles = {header.name: family.role(header, opened.config) for header in opened.headers.values()}
    return [(name, role.parts) for name, role in roles.items() if len(role.parts) > 1]


@pytest.mark.parametrize(("preset", "make"), [("NVFP4A16", nvfp4), ("FP8_DYNAMIC", fp8)])
def test_experts_written_one_by_one_come_back_fused(preset: str, make: Any, tmp_path: Path) -> None:
    """Llama 4's 3-D parameters are rebuilt from per-expert tensors: right expert, half and transposition."""
    source = tiny_llama4(tmp_path / "source", hidden=32, intermediate=64, experts=3, layers=1)
    fused = _experts(source)
    stored = load_file(source / "model.safetensors")
    meant = {}
    for name, parts in fused:
        del stored[name]
        for part in parts:
            tensors, meant[part.module] = make(part.out_features, part.in_features)
            stored |= {f"{part.module}.{local}": tensor for local, tensor in tensors.items()}
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    write_quantization_config(source, preset)
    loaded = load_checkpoint_model(source, torch.float32, fused=fused)
    experts = loaded.model.get_submodule("model.layers.0.feed_forward.experts")
    prefix = "model.layers.0.feed_forward.experts"
    for expert in range(3):
        gate, up, down = (meant[f"{prefix}.{expert}.{kind}_proj"] for kind in ("gate", "up", "down"))
        gate_up = torch.cat([gate, up]).T
        torch.testing.assert_close(experts.gate_up_proj[expert].double(), gate_up, rtol=BF16, atol=0)
        torch.testing.assert_close(experts.down_proj[expert].double(), down.T, rtol=BF16, atol=0)
    assert loaded.via == "decoded"
    assert loaded.activations_simulated is (False if preset == "FP8_DYNAMIC" else None)
    with pytest.raises(CheckpointError, match=r"has no tensor for .*experts"):
        load_checkpoint_model(source, torch.float32)


def test_a_lost_expert_is_named(tmp_path: Path) -> None:
    """One missing expert is an error, not a random or a zero matrix."""
    source = tiny_llama4(tmp_path / "source", hidden=32, intermediate=64, experts=2, layers=1)
    fused = _experts(source)
    stored = load_file(source / "model.safetensors")
    for name, parts in fused:
        del stored[name]
        for part in parts[:-1]:
            tensors, _ = nvfp4(part.out_features, part.in_features)
            stored |= {f"{part.module}.{local}": tensor for local, tensor in tensors.items()}
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    write_quantization_config(source, "NVFP4A16")
    with pytest.raises(CheckpointError, match=r"1 of its 2 parts are missing: .*experts\.1\.down_proj"):
        load_checkpoint_model(source, torch.float32, fused=fused)


def test_source_loads_in_the_dtype_asked_for(tmp_path: Path) -> None:
    """Parameters are cast, rotary frequencies are not, and the stored values survive."""
    folder = tiny_llama(tmp_path / "source")
    model = load_source_model(FolderSource(folder), torch.float32)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, stored[name].float()) for name, value in model.named_parameters())
    frequencies = model.model.rotary_emb.inv_freq.clone()
    set_dtype(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert not model.training


def test_gguf_baseline_is_what_transformers_unpacks(tmp_path: Path) -> None:
    """Bit for bit transformers' own dequantized model, rounded to bfloat16 and then cast."""
    path = tiny_gguf(tmp_path / "model.gguf")
    model = load_source_model(GgufSource(path), torch.float32)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype is torch.float32
        assert torch.equal(parameter, expected[name].float()), name


def test_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No bars, advice or warnings of the libraries reach stdout or stderr."""
    source = tiny_llama(tmp_path / "source")
    compress_folder(source, tmp_path / "result", "NVFP4A16")
    gguf = GgufSource(tiny_gguf(tmp_path / "model.gguf"))
    capfd.readouterr()
    load_source_model(FolderSource(source), torch.float32)
    load_source_model(gguf, torch.float32)
    load_checkpoint_model(tmp_path / "result", torch.float32)
    load_tokenizer(tmp_path / "result")
    assert capfd.readouterr() == ("", "")


def test_a_missing_parameter_is_an_error(tmp_path: Path) -> None:
    """transformers would fill it at random and go on."""
    folder = tiny_llama(tmp_path / "source")
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (
        lambda: load_source_model(FolderSource(folder), torch.float32),
        lambda: load_checkpoint_model(folder, torch.float32),
    ):
        with pytest.raises(
            CheckpointError, match=r"has no tensor for model\.layers\.1\.mlp\.up_proj\.weight"
        ):
            load()


def test_scales_that_nothing_uses_are_an_error(tmp_path: Path) -> None:
    """A quantized matrix that the config ignores would otherwise be left random or raw."""
    source = tiny_llama(tmp_path / "source")
    compress_folder(source, tmp_path / "result", "NVFP4A16")
    path = tmp_path / "result" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"].append("re:.*q_proj$")
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="q_proj"):
        load_checkpoint_model(tmp_path / "result", torch.float32)


def test_faults_are_told_in_one_line(tmp_path: Path) -> None:
    """Foreign formats, empty folders, cut files and code: the error names the folder."""
    source = tiny_llama(tmp_path / "source")
    compress_folder(source, tmp_path / "gptq", "W4A16")
    _edit(tmp_path / "gptq", lambda config: config["quantization_config"].update(quant_method="gptq"))
    compress_folder(source, tmp_path / "cut", "NVFP4A16")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    compress_folder(source, tmp_path / "code", "NVFP4A16")
    _edit(tmp_path / "code", lambda c: c.update(model_type="x", auto_map={"AutoConfig": "evil.Config"}))
    (tmp_path / "empty").mkdir()
    reasons = {
        "gptq": "'gptq'",
        "cut": "truncated shard",
        "code": "custom code",
        "empty": "config.json",
    }
    for name, reason in reasons.items():
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_checkpoint_model(tmp_path / name, torch.float32)
        assert caught.value.where.startswith(str(tmp_path / name))
        assert "\n" not in caught.value.what
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path / "empty")


def _edit(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_quiet_gives_everything_back() -> None:
    """Bars and verbosity are as before, also after a failure inside."""
    from tqdm import tqdm
    from transformers.utils import logging as hf_logging

    def state() -> tuple[object, ...]:
        return hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled(), vars(tqdm)["__init__"]

    def fail() -> None:
        with quiet():
            assert tqdm([1], disable=False).disable
            raise KeyError

    before = state()
    with pytest.raises(KeyError):
        fail()
    assert state() == before
    assert not tqdm([1], disable=False).disable
