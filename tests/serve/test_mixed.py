"""vLLM serves the schemes that ``auto`` mixes side by side in one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from compressor.api import run
from tests.e2e.cases import write_recipe
from tests.serve.families import FAMILIES
from tests.serve.test_verify import asked

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

# Each scheme somewhere in one block or the other, and 16 bit beside them in the same block.
MIX = {
    "llama": [
        ("re:.*layers[.]0[.]self_attn[.][qkv]_proj", "int8"),
        ("*layers.0.self_attn.o_proj", "fp8_dynamic"),
        ("re:.*layers[.]0[.]mlp[.](gate|up)_proj", "copy"),
        ("re:.*layers[.]1[.]self_attn[.][qkv]_proj", "fp8_dynamic"),
        ("*layers.1.self_attn.o_proj", "copy"),
        ("*layers.1.mlp.down_proj", "int8"),
    ],
    "qwen3_moe": [
        ("re:.*layers[.]0[.]mlp[.]experts[.].*", "fp8_dynamic"),
        ("re:.*layers[.]0[.]self_attn[.][qkv]_proj", "int8"),
        ("re:.*layers[.]1[.]self_attn[.][qkv]_proj", "copy"),
    ],
}


@pytest.mark.parametrize("family", MIX)
def test_schemes_side_by_side_agree(
    family: str, tmp_path: Path, engine_python: Path, weight_only_env: Mapping[str, str]
) -> None:
    """One checkpoint with NVFP4A16, FP8, INT8 and 16 bit: vLLM's loader reads each as it is meant."""
    source = FAMILIES[family](tmp_path / "source")
    rules = ", ".join(f"{{match: {json.dumps(match)}, scheme: {scheme}}}" for match, scheme in MIX[family])
    recipe = write_recipe(
        tmp_path / "recipe.yaml", source, f"{{scheme: nvfp4a16, rules: [{rules}]}}", "evaluate: null"
    )
    result = run(recipe, output=tmp_path / "out" / "result").output
    config = json.loads((result / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 3
    found, engine = asked(result, engine_python, weight_only_env)
    assert engine.verdict == "agrees", engine.reason
    assert found.passed
