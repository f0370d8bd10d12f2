"""How much memory loading for the reference takes, in numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.api import run
from compressor.checkpoint.sources import open_source
from compressor.progress import Silent
from compressor.verify import models
from compressor.verify.models import _memory_needed, load_reference
from compressor.verify.spec import VerifySpec
from tests.checkpoint.tiny_gguf import tiny_gguf
from tests.e2e.cases import write_recipe
from tests.tiny import tiny_llama, tiny_llama4

GIB = 1 << 30


def parameters(source: Path) -> int:
    """What the source's tensors hold."""
    return sum(header.numel for header in open_source(str(source)).headers.values())


def test_stored_elements_are_counted_by_what_they_hold(tmp_path: Path) -> None:
    """1,000 in 16 bit, 1,000 in FP8, 1,000 in FP32, 500 bytes of two, 125 words of eight: 5,000 weights."""
    save_file(
        {
            "a": torch.zeros(1000, dtype=torch.bfloat16),
            "b": torch.zeros(1000, dtype=torch.float8_e4m3fn),
            "c": torch.zeros(1000),
            "d": torch.zeros(500, dtype=torch.uint8),
            "e": torch.zeros(125, dtype=torch.int32),
        },
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert _memory_needed(tmp_path, None) == 4 * 5000 + 2 * GIB


@pytest.mark.parametrize(("scheme", "per_weight"), [("int8", 4), ("fp8_dynamic", 6)])
def test_rounded_activations_take_a_copy_in_16_bit(tmp_path: Path, scheme: str, per_weight: int) -> None:
    """4 bytes a parameter, and 2 more where activations are rounded."""
    source = tiny_llama(tmp_path / "source", hidden=128, intermediate=256)
    output = run(
        write_recipe(tmp_path / "r.yaml", source, f"{{scheme: {scheme}}}"), output=tmp_path / "out"
    ).output
    linear = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    others = parameters(source) - linear
    # One for each row of q, k, v, o, gate, up and down of two layers.
    scales = 2 * (128 + 64 + 64 + 128 + 256 + 256 + 128)
    # Four int8 of a word count as eight 4-bit weights; each int8 module has a shape of two numbers.
    stored = 2 * linear + 14 * 2 if scheme == "int8" else linear
    assert _memory_needed(output, None) == per_weight * (stored + others + scales) + 2 * GIB


def test_experts_decoded_one_by_one_are_held_twice(tmp_path: Path) -> None:
    """All decoded tensors, and the model made of them: 8 bytes a parameter, scales of FP8 rows included."""
    source = tiny_llama4(tmp_path / "source", hidden=128, intermediate=128)
    output = run(
        write_recipe(tmp_path / "r.yaml", source, "{scheme: fp8_dynamic}"), output=tmp_path / "out"
    ).output
    attention, expert = 128 + 64 + 64 + 128, 3 * 128
    scales = 2 * (attention + 4 * expert + expert)
    assert _memory_needed(output, None) == 8 * (parameters(source) + scales) + 2 * GIB


def test_the_larger_of_checkpoint_and_source_counts(tmp_path: Path) -> None:
    """They are loaded one after the other; a GGUF source's tensors in 16 bit lie beside its model."""
    small = tiny_llama(tmp_path / "small", hidden=64)
    large = tiny_llama(tmp_path / "large", hidden=128, intermediate=256)
    tiny_gguf(tmp_path / "model.gguf")
    gguf = open_source(str(tmp_path / "model.gguf"))
    assert parameters(large) > parameters(small)
    assert _memory_needed(small, open_source(str(large))) == 4 * parameters(large) + 2 * GIB
    assert _memory_needed(large, open_source(str(small))) == 4 * parameters(large) + 2 * GIB
    assert _memory_needed(small, gguf) == 6 * parameters(tmp_path / "model.gguf") + 2 * GIB


def test_too_little_memory_for_the_source_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint alone would fit: nothing is loaded that the source then kills."""
    small = tiny_llama(tmp_path / "small", hidden=64)
    large = open_source(str(tiny_llama(tmp_path / "large", hidden=128, intermediate=256)))
    monkeypatch.setattr(models, "available_memory_bytes", lambda: _memory_needed(small, None))
    spec = VerifySpec(checkpoint=small, cache=tmp_path / "hub", tokens=64)
    assert load_reference(spec, large, Silent()).check.status == "skipped"
    assert load_reference(spec, None, Silent()).check.status == "passed"
