"""The shipped headers of published models, and the script that writes them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from compressor.checkpoint.shipped import ShippedHeaders
from compressor.model.families import family_for, tied
from compressor.planner.plan import make_plan
from compressor.recipe.load import load_recipe
from compressor.spec import TensorHeader

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
# What the publishers' checkpoints in 16 bit hold.
PARAMETERS = {
    "llama-4-scout": 108_641_793_536,
    "llama-4-maverick": 401_583_781_376,
    "llama-3-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-next-80b-a3b": 81_324_862_720,
    "jamba-1.5-mini": 51_570_323_328,
}
SHIPPED = [*PARAMETERS, "deepseek-v3", "gpt-oss-120b"]


def shipped(name: str) -> tuple[dict, dict[str, TensorHeader]]:
    """config.json and the headers of one model."""
    config = json.loads((CONFIGS / name / "config.json").read_text())
    return config, dict(ShippedHeaders(CONFIGS / name, quantized=True).headers)


@pytest.fixture(scope="module")
def script():
    """scripts/make_headers.py as a module."""
    spec = importlib.util.spec_from_file_location("make_headers", ROOT / "scripts" / "make_headers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SHIPPED)
def test_the_script_writes_what_is_shipped(script, name, tmp_path):
    """Same transformers, same bytes; the note names the script and the version."""
    script.write(tmp_path, *script.MODELS[name])
    for file in ("config.json", "tensors.json"):
        assert (tmp_path / file).read_text() == (CONFIGS / name / file).read_text()
    assert (CONFIGS / name / "tensors.json").stat().st_size < 300_000
    source = json.loads((CONFIGS / name / "tensors.json").read_text())["source"]
    assert "scripts/make_headers.py with transformers 5." in source


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_headers_count_as_published(name):
    """Parameters of the model cards; none is tied."""
    config, headers = shipped(name)
    assert sum(header.numel for header in headers.values()) == PARAMETERS[name]
    assert sum(header.nbytes for header in headers.values()) == 2 * PARAMETERS[name]
    assert not tied(config, headers)


def test_deepseek_v3_is_stored_in_fp8_blocks():
    """The published count, scales included; every FP8 matrix has a scale for each 128 x 128 values."""
    _, headers = shipped("deepseek-v3")
    assert len(headers) == 91_991
    assert sum(header.numel for header in headers.values()) == 684_531_386_000
    coded = [header for header in headers.values() if header.dtype == "F8_E4M3"]
    assert len(coded) == 61 * 5 + 3 * 3 + 58 * 257 * 3 + 5 + 257 * 3
    for header in coded:
        blocks = tuple(-(-size // 128) for size in header.shape)
        assert headers[f"{header.name}_scale_inv"].shape == blocks


def test_gpt_oss_stores_its_experts_in_mxfp4():
    """Two values a byte and a scale for each 32 of them; all else in 16 bit."""
    _, headers = shipped("gpt-oss-120b")
    blocks = {name: header for name, header in headers.items() if header.dtype == "U8" and "_blocks" in name}
    assert len(blocks) == 2 * 36
    for name, header in blocks.items():
        assert headers[name.replace("_blocks", "_scales")].shape == header.shape[:-1]
        assert header.shape[-1] == 16
    rest = sum(header.numel for header in headers.values() if header.dtype == "BF16")
    assert 2 * sum(header.numel for header in blocks.values()) + rest == 116_829_156_672


def test_a_plan_says_that_gpt_oss_would_grow(tmp_path, monkeypatch):
    """Its experts cannot be stored quantized as vLLM reads them: in 16 bit they are four times as large."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "r.yaml").write_text(
        f"model: {{source: openai/gpt-oss-120b, headers: {CONFIGS / 'gpt-oss-120b'}, from: dequantize}}\n"
        "weights: {scheme: nvfp4a16}\nevaluate: null\n"
    )
    plan = make_plan(load_recipe(str(tmp_path / "r.yaml")), output=tmp_path / "out", planning=True)
    (said,) = [warning for warning in plan.warnings if "larger" in warning]
    assert said.endswith("232.3 GB of tensors against 65.2 GB")


def test_scout_is_mostly_experts():
    """48 layers x 16 experts x 3 matrices; the vision tower and the routers stay out."""
    config, headers = shipped("llama-4-scout")
    family = family_for(config)
    roles = {name: family.role(header, config) for name, header in headers.items()}
    parts = [part for role in roles.values() if role.kind == "linear" for part in role.parts]
    experts = [part for part in parts if part.expert is not None]
    assert len(experts) == 48 * 16 * 3
    assert sum(part.out_features * part.in_features for part in experts) == 3 * 5120 * 8192 * 16 * 48
    assert len(parts) - len(experts) == 48 * (4 + 3)
    assert all(part.module.startswith("language_model.model.layers.") for part in parts)
    linear = sum(part.out_features * part.in_features for part in parts)
    assert linear == sum(headers[name].numel for name, role in roles.items() if role.kind == "linear")


def test_llama_70b_has_seven_matrices_a_layer():
    """And an embedding and a head of 1.05 billion parameters each, outside of them."""
    config, headers = shipped("llama-3.3-70b")
    family = family_for(config)
    roles = {name: family.role(header, config) for name, header in headers.items()}
    assert sum(role.kind == "linear" for role in roles.values()) == 80 * 7
    ends = {
        name: headers[name].numel for name, role in roles.items() if role.kind in ("embedding", "lm_head")
    }
    assert ends == {"model.embed_tokens.weight": 128256 * 8192, "lm_head.weight": 128256 * 8192}
