"""Both dialects from recipe to reloaded checkpoint: the same weights, spelled differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import compressor
from compressor.checkpoint.safetensors_file import read_header
from compressor.cli import evaluate, inspect
from compressor.errors import CheckpointError, PlanError
from compressor.model.decode import StoredWeights
from compressor.report.manifest import check_manifest
from compressor.stages import stream as stream_stage
from tests.tiny import tiny_llama, tiny_llama4

from .cases import content, write_recipe

SCHEMES = ["nvfp4a16", "fp8_dynamic", "fp8_block"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and one with experts, whose widths suit every scheme."""
    root = tmp_path_factory.mktemp("sources")
    return {
        "llama": tiny_llama(root / "llama", hidden=128, intermediate=256, heads=2, kv_heads=2),
        "llama4": tiny_llama4(
            root / "llama4",
            hidden=128,
            intermediate=128,
            heads=2,
            kv_heads=2,
            experts=2,
            moe_step=2,
            intermediate_dense=256,
        ),
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some text; the model is random, so any will do."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return path


def _recipe(tmp_path: Path, source: Path, weights: str, dialect: str, evaluate: str = "null") -> Path:
    rest = f"evaluate: {evaluate}\nexport: {{format: {dialect}}}"
    return write_recipe(tmp_path / f"{dialect}.yaml", source, weights, rest)


def _assert_same_weights(first: Path, second: Path) -> None:
    """Every module decodes to the same bits, and everything else lies there unchanged."""
    ours, theirs = StoredWeights(first), StoredWeights(second)
    assert (ours.dialect, theirs.dialect) == ("compressed-tensors", "modelopt")
    assert ours.modules == theirs.modules
    assert ours.modules
    for module in ours.modules:
        assert torch.equal(ours.weight(module), theirs.weight(module)), module
    packed = [{name for module in w.modules for name in w.parts(module)} for w in (ours, theirs)]
    assert ours.names - packed[0] == theirs.names - packed[1]
    for name in ours.names - packed[0]:
        assert torch.equal(ours.stored(name), theirs.stored(name)), name


@pytest.mark.parametrize("model", ["llama", "llama4"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_hold_the_same_weights_and_measure_alike(
    scheme: str, model: str, tmp_path: Path, sources: dict[str, Path], text: Path
) -> None:
    """Bit for bit, and perplexity and KL to the last digit: activations are rounded alike as well.

    In one workspace: the stages of one are never taken for the other's.
    """
    evaluate = f"{{text: {json.dumps(str(text))}, tokens: 96, context: 48}}"
    results = {}
    for dialect in ("compressed-tensors", "modelopt"):
        recipe = _recipe(tmp_path, sources[model], f"{{scheme: {scheme}}}", dialect, evaluate)
        results[dialect] = compressor.run(recipe, output=tmp_path / "out" / dialect)
        assert not any(stage.resumed for stage in results[dialect].report.stages)
        assert check_manifest(results[dialect].output) == []
    first, second = results.values()
    _assert_same_weights(first.output, second.output)
    assert first.report.quality is not None
    assert second.report.quality is not None
    assert second.report.quality.kl == first.report.quality.kl
    assert second.report.quality.perplexity == first.report.quality.perplexity
    assert first.report.quality.activations_simulated == second.report.quality.activations_simulated


def test_a_mixture_holds_the_same_weights(tmp_path: Path, sources: dict[str, Path]) -> None:
    """Two algorithms, a copied branch and a quantized head."""
    weights = (
        "{scheme: nvfp4a16, ignore: ['*.layers.0.self_attn.*'], "
        "rules: [{match: '*.down_proj', scheme: fp8_block}, {match: lm_head, scheme: fp8_dynamic}]}"
    )
    first, second = (
        compressor.run(_recipe(tmp_path, sources["llama"], weights, dialect), output=tmp_path / dialect)
        for dialect in ("compressed-tensors", "modelopt")
    )
    _assert_same_weights(first.output, second.output)
    config = json.loads((second.output / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"]["lm_head"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}


def test_the_folder_says_what_it_is(tmp_path: Path, sources: dict[str, Path], text: Path) -> None:
    """Both configs agree, ``inspect`` and ``eval`` read it, and its own recipe makes the same again."""
    recipe = _recipe(tmp_path, sources["llama"], "{scheme: nvfp4a16}", "modelopt")
    output = compressor.run(recipe, output=tmp_path / "out").output
    inline = json.loads((output / "config.json").read_text())["quantization_config"]
    beside = json.loads((output / "hf_quant_config.json").read_text())
    assert inline["quant_method"] == "modelopt"
    assert inline["quant_algo"] == beside["quantization"]["quant_algo"] == "W4A16_NVFP4"
    assert inline["ignore"] == beside["quantization"]["exclude_modules"]
    headers = read_header(output / "model.safetensors").headers
    assert {name.rpartition(".")[2] for name in headers if ".q_proj." in name} == {
        "weight",
        "weight_scale",
        "weight_scale_2",
    }
    inspected = CliRunner().invoke(inspect.command, [str(output)])
    assert inspected.exit_code == 0
    assert "modelopt: W4A16_NVFP4" in inspected.stdout
    asked = [str(output), "--source", str(sources["llama"]), "--text", str(text), "--tokens", "96"]
    evaluated = CliRunner().invoke(evaluate.command, [*asked, "--context", "48", "--json", "--quiet"])
    assert evaluated.exit_code == 0, evaluated.output
    assert 0 < json.loads(evaluated.stdout)["kl"]["mean"] < 0.5
    again = compressor.run(output / "recipe.yaml", output=tmp_path / "again")
    assert content(again.output) == content(output)


def test_a_broken_run_goes_on_at_the_next_shard(
    tmp_path: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the first dialect: finished shards are kept, and the end is bit-identical."""
    rest = "evaluate: null\nexport: {format: modelopt, max_shard_bytes: 100KB}"
    recipe = write_recipe(tmp_path / "r.yaml", sources["llama"], "{scheme: fp8_block}", rest)
    whole = compressor.run(recipe, output=tmp_path / "whole" / "out")
    write, written = stream_stage._write_shard, []

    def breaking(*arguments: object) -> object:
        if len(written) == 2:
            raise CheckpointError("the disk is gone")
        written.append(arguments)
        return write(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(stream_stage, "_write_shard", breaking)
        with pytest.raises(CheckpointError, match="gone"):
            compressor.run(recipe, output=tmp_path / "broken" / "out")
    resumed = compressor.run(recipe, output=tmp_path / "broken" / "out")
    assert resumed.report.stages[0].resumed
    assert content(resumed.output) == content(whole.output)


def test_schemes_without_a_form_are_refused_in_the_plan(tmp_path: Path, sources: dict[str, Path]) -> None:
    """Every rule concerned is named with its place in the file, before anything is written."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{source: {json.dumps(str(sources['llama']))}}}\n"
        "weights:\n"
        "  scheme: mxfp4\n"
        "  rules:\n"
        "    - {match: '*.down_proj', scheme: {kind: int4, group_size: 64}}\n"
        "    - {match: '*.o_proj', scheme: nvfp4a16}\n"
        "export: {format: modelopt}\n"
        "evaluate: null\n"
    )
    with pytest.raises(PlanError) as caught:
        compressor.plan(recipe, output=tmp_path / "out")
    faults = {fault.where.rpartition("/")[2]: fault for fault in caught.value.faults}
    places = ["r.yaml:3:3: weights.scheme", "r.yaml:5:30: weights.rules.0.scheme"]
    assert sorted(faults) == places
    first, second = (faults[place] for place in places)
    assert first.what == (
        "MXFP4A16 has no form in ModelOpt's dialect, which holds NVFP4A16, NVFP4, FP8, FP8_DYNAMIC, FP8_BLOCK"
    )
    assert second.what.startswith("W4A16")
    assert first.fix == "take one of these schemes, or set export.format to compressed-tensors"
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(tmp_path: Path, sources: dict[str, Path]) -> None:
    """With the known ones."""
    recipe = _recipe(tmp_path, sources["llama"], "{scheme: nvfp4a16}", "gptq")
    with pytest.raises(ValueError, match=r"export\.format|gptq.yaml") as caught:
        compressor.plan(recipe)
    assert "compressed-tensors" in str(caught.value)
    assert "modelopt" in str(caught.value)


def test_fp8_experts_are_warned_of(tmp_path: Path, sources: dict[str, Path]) -> None:
    """The plan says what vLLM cannot serve; the run goes on, for other engines."""
    recipe = _recipe(tmp_path, sources["llama4"], "{scheme: fp8_block}", "modelopt")
    warnings = compressor.plan(recipe, output=tmp_path / "out").warnings
    assert [line for line in warnings if "cannot serve experts of FP8_BLOCK" in line]
