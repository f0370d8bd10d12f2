"""Recipes that scale positions, from end to end: what is written, loaded back and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.cli.inspect import command as inspect
from compressor.model.load import load_checkpoint_model
from compressor.progress import Silent
from compressor.verify.meaning import check_meaning
from compressor.verify.run import verify
from compressor.verify.scaled import scaled_source
from compressor.verify.spec import VerifySpec
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


def test_a_verification_takes_the_config_for_right(tmp_path: Path, source: Path) -> None:
    """As the recipe says it, and no other: compared with the source under the same config."""
    output = run(tmp_path, source, f"{YARN}{MEASURED}")
    found = checks(output)
    assert found.pop("engine").startswith("skipped")
    assert found["context"].startswith("passed yarn, factor 4, 2,048 tokens")
    assert {name: text for name, text in found.items() if not text.startswith("passed")} == {}
    config = json.loads((output / "config.json").read_text())
    config["rope_parameters"]["beta_fast"] = 16.0
    (output / "config.json").write_text(json.dumps(config))
    scaled, (check,) = scaled_source(output, FolderSource(source))
    assert check.status == "passed"
    assert scaled is not None
    assert "beta_fast" in check_meaning(output, scaled, near=tmp_path).detail
    (output / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    for known in (FolderSource(source), None):
        assert [check.status for check in scaled_source(output, known)[1]] == ["failed"]


def checks(output: Path) -> dict[str, str]:
    """What a verification without an engine finds."""
    text = output.parent / "text.txt"
    text.write_text("Five wizards quickly jump over my boxed vintage. " * 20)
    spec = VerifySpec(checkpoint=output, text=str(text), tokens=256, engine="none", cache=output.parent / "c")
    return {check.name: f"{check.status} {check.detail}" for check in verify(spec, Silent()).checks}


def test_inspect_says_how_positions_are_scaled(tmp_path: Path, source: Path) -> None:
    """Of the result, and what is wrong with one that somebody edited."""
    output = run(tmp_path, source, f"{YARN}evaluate: null\n")
    shown = CliRunner().invoke(inspect, [str(output)])
    assert "positions: yarn, factor 4.0, from 512 tokens, up to 2,048 tokens, theta 10000.0" in shown.output
    config = json.loads((output / "config.json").read_text())
    config["rope_parameters"].pop("original_max_position_embeddings")
    (output / "config.json").write_text(json.dumps(config))
    assert "error: " in CliRunner().invoke(inspect, [str(output)]).output
    shown = CliRunner().invoke(inspect, [str(source), "--json"])
    assert json.loads(shown.output)["scaling"]["method"] == "default"
