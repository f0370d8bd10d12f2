"""Llama 4's experts, compressed one by one, are the tensors of its checkpoints again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.sources import From, open_source
from compressor.errors import CheckpointError
from compressor.model.decode import StoredWeights, decoded_tensors, fused_tensors
from tests.tiny import tiny_llama4

LAYER = "model.layers.0.feed_forward.experts"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with fused experts."""
    return tiny_llama4(tmp_path_factory.mktemp("unfused") / "model")


@pytest.fixture(scope="module")
def quantized(original: Path) -> Path:
    """The same, compressed: its experts are written one by one."""
    recipe = original.parent / "r.yaml"
    recipe.write_text(f"model: {{source: {original}}}\nweights: {{scheme: nvfp4a16}}\nevaluate: null\n")
    return compressor.run(recipe, output=original.parent / "quantized").output


def test_tensors_are_those_of_the_original(original: Path, quantized: Path) -> None:
    """The same headers; values as the decoder puts them together when it knows the original."""
    source = open_source(str(quantized), from_="dequantize")
    first = open_source(str(original))
    assert f"{LAYER}.0.gate_proj.weight_packed" in StoredWeights(quantized).names
    assert dict(source.headers) == dict(first.headers)
    expected = decoded_tensors(StoredWeights(quantized), fused_tensors(first))
    for name in source.headers:
        assert torch.equal(source.read(name), expected[name].bfloat16()), name
    for name in (f"{LAYER}.gate_up_proj", f"{LAYER}.down_proj"):
        one = source.read(name, 2)
        assert torch.equal(one, expected[name][2].bfloat16())


def test_a_run_on_it(original: Path, quantized: Path) -> None:
    """Streamed, loaded back and measured against the dequantized model."""
    root = original.parent
    (root / "heldout.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    recipe = root / "again.yaml"
    recipe.write_text(
        f"model: {{source: {quantized}, from: dequantize}}\nweights: {{scheme: fp8_dynamic}}\n"
        f"evaluate: {{text: {root / 'heldout.txt'}, tokens: 128, context: 64}}\n"
    )
    report = compressor.run(recipe, output=root / "again").report
    assert report.quality is not None
    assert 0 < report.quality.kl.mean < 0.1


@pytest.mark.parametrize(
    "lost, message",
    [("1.up_proj", "experts.1.up_proj.weight is missing"), ("0.gate_proj", "not the first of them")],
)
def test_a_lost_expert(lost: str, message: str, quantized: Path, tmp_path: Path) -> None:
    """Experts with a gap are no model's."""
    tensors = load_file(quantized / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{LAYER}.{lost}.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((quantized / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        open_source(str(tmp_path), from_="dequantize")


@pytest.mark.parametrize(
    "how, model_type, message",
    [
        ("keep", "llama4_text", "(?s)does not carry experts one by one, such as .*down_proj.*dequantize"),
        ("dequantize", "gpt_oss", "experts one by one are not put together for this model"),
    ],
)
def test_refused(how: From, model_type: str, message: str, quantized: Path, tmp_path: Path) -> None:
    """Told when it is opened, not when the result is loaded back."""
    config = json.loads((quantized / "config.json").read_text()) | {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((quantized / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        open_source(str(tmp_path), from_=how)
