"""A checkpoint of 1 GB whose blocks do not fit in the memory that the recipe allows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor.spec import TensorHeader
from scripts.benchmarks.process import compress
from scripts.benchmarks.scout import scout_headers, write_random

# Sizes of Llama 4 Scout -> here: its experts keep nearly all of a block.
SIZES = {5120: 1024, 1024: 256, 16384: 8192, 8192: 4096, 202048: 512}
LAYERS = 2
MOST_BYTES = 1_050_000_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two text-only layers of 0.4 GB."""
    headers = [
        TensorHeader(
            header.name.removeprefix("language_model."),
            header.dtype,
            tuple(SIZES.get(size, size) for size in header.shape),
        )
        for header in scout_headers(LAYERS)
        if header.name.startswith("language_model.")
    ]
    config = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "intermediate_size_mlp": 8192,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_hidden_layers": LAYERS,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "bos_token_id": 254,
        "eos_token_id": 255,
        "pad_token_id": 255,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    folder = tmp_path_factory.mktemp("large") / "model"
    write_random(folder, headers, config)
    return folder


def test_walk_within_the_memory(source: Path, tmp_path: Path) -> None:
    """Activation ranges are heard although two blocks do not fit; the process's own memory stays below the
    bound, and what was resident is as predicted.
    """
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 0.8e9
    (tmp_path / "shown.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{source: {json.dumps(str(source))}}}\n"
        "weights: {scheme: fp8_static, solver: {kind: rtn, search: minmax}}\n"
        f"calibration: {{datasets: [{{path: {json.dumps(str(tmp_path / 'shown.txt'))}}}], num_samples: 2, "
        "sequence_length: 64}\n"
        f"evaluate: null\nworkspace: {{max_memory_bytes: {MOST_BYTES}}}\n"
    )
    places = ("--output", tmp_path / "out", "--workspace", tmp_path / "space")
    planned = json.loads(compress("plan", recipe, *places, "--json")["stdout"])
    assert planned["calibration"]["stored_experts"]
    found = compress("run", recipe, *places, "--quiet")
    assert found["peak_anonymous_bytes"] < MOST_BYTES
    stages = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]
    walked = next(stage for stage in stages if stage["name"] == "walk")
    assert walked["peak_rss_bytes"] == pytest.approx(planned["peak_rss_bytes"], rel=0.2)
