"""Recipes that scale positions, from end to end: what is written, loaded back and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import compressor
from compressor.model.load import load_checkpoint_model
from tests.tiny import tiny_llama

from .cases import write_recipe

YARN = "context: {method: yarn, target_length: 2048}\n"
MEASURED = "evaluate: {tokens: 512, context: 128}\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 512 tokens whose heads turn 16 pairs."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny_llama(folder, hidden=64, intermediate=128, heads=2, kv_heads=1)


def run(folder: Path, source: Path, rest: str, weights: str = "{scheme: nvfp4a16}") -> Path:
    """The output folder of a run."""
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder / "recipe.yaml", source, weights, rest)
    return compressor.run(recipe, output=folder / "out" / "result").output


def test_the_result_reads_further(tmp_path: Path, source: Path) -> None:
    """config.json as scaled, a raised tokenizer limit, and nothing else of the source's config changed."""
    output = run(tmp_path, source, f"{YARN}evaluate: null\n")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, output))
    assert after.pop("max_position_embeddings") == 2048
    rope = after.pop("rope_parameters")
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 512)
    after.pop("quantization_config")
    assert after == {name: before[name] for name in after}
    tokenizer = json.loads((output / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 2048
    assert (output / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()
    model = load_checkpoint_model(output, torch.float32).model
    assert model.config.max_position_embeddings == 2048
    assert model(torch.arange(1024)[None] % 256).logits.isfinite().all()


def test_weights_are_those_of_the_source(tmp_path: Path, source: Path) -> None:
    """Round to nearest sees no positions: the same bytes, under another key."""
    plain = run(tmp_path / "plain", source, "evaluate: null\n")
    scaled = run(tmp_path / "scaled", source, f"{YARN}evaluate: null\n")
    assert (plain / "model.safetensors").read_bytes() == (scaled / "model.safetensors").read_bytes()


def test_what_scaling_alone_costs_is_told_apart(tmp_path: Path, source: Path) -> None:
    """The 16-bit source with and without scaling, beside the whole; where nothing else is done they agree."""
    both = run(tmp_path / "both", source, f"{YARN}{MEASURED}")
    alone = run(tmp_path / "alone", source, f"{YARN}{MEASURED}", "{scheme: nvfp4a16, ignore: ['*']}")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (both, alone)]
    apart, whole = (report["context"]["cost"] for report in reports)
    assert (apart["is_all"], whole["is_all"]) == (False, True)
    assert apart | {"is_all": True} == whole
    assert reports[0]["quality"]["perplexity"]["result"] != apart["scaled"]
    assert reports[1]["quality"]["perplexity"]["result"] == whole["scaled"] != whole["source"]
    assert reports[0]["serve"]["command"].endswith(" --max-model-len 2048")
    assert "## Context" in (both / "README.md").read_text()
