"""Recipes from end to end on tiny models: what comes out, what is refused, what is left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.inventory import take_inventory
from compressor.errors import CheckpointError, GateError, PlanError, UserError
from compressor.export import check_publishable
from compressor.progress import Silent
from compressor.report.manifest import check_manifest
from compressor.runner import RunResult
from tests.tiny import tiny_llama, tiny_llama4

from .cases import content, write_recipe

SCHEMES = [
    "nvfp4a16",
    "mxfp4",
    "fp8_dynamic",
    "fp8_block",
    "{kind: int4, group_size: 32}",
    "{kind: int4, group_size: 64, symmetric: false}",
    "{kind: int4, group_size: 128}",
    "int8",
    "{kind: int8, activations: dynamic}",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in two shards whose widths suit every scheme."""
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_llama(folder, hidden=128, intermediate=256, heads=2, kv_heads=2, shards=2)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some text; the model is random, so any will do."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


class _Warnings(Silent):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        """Keeps it."""
        self.said.append(text)


def _run(
    tmp_path: Path, source: Path, weights: str, rest: str = "evaluate: null"
) -> compressor.api.RunResult:
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, rest)
    return compressor.run(recipe, output=tmp_path / "out" / "result")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_from_recipe_to_reloaded_checkpoint(
    scheme: str, tmp_path: Path, source: Path, text: Path
) -> None:
    """Each scheme runs, is measured as reloaded by transformers, and the report's bytes are the file's."""
    rest = f"evaluate: {{text: {json.dumps(str(text))}, tokens: 256, context: 64}}"
    result = _run(tmp_path, source, f"{{scheme: {scheme}}}", rest)
    found = take_inventory(result.output)
    report = json.loads((result.output / "report.json").read_text())
    assert found.bytes == report["result"]["bytes"]
    assert report["result"]["bytes"] < report["source"]["bytes"]
    assert report["quality"]["kl"]["mean"] >= 0
    # Random weights: a wrong scale, a swapped nibble or a transposed matrix gives whole nats.
    assert report["quality"]["kl"]["mean"] < 0.25
    (errors,) = report["weights"]["relative_error"].values()
    assert 0 < errors["mean"] < 0.03
    assert check_manifest(result.output) == []


def test_output_folder_is_complete(tmp_path: Path, source: Path) -> None:
    """Every file of the contract is there, the recipe in it makes the same result, nothing else is."""
    result = _run(tmp_path, source, "{scheme: nvfp4a16}", "evaluate: null\nexport: {max_shard_bytes: 100KB}")
    names = {path.name for path in result.output.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert names - shards == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors.index.json",
        "recipe.yaml",
        "report.html",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    again = compressor.run(result.output / "recipe.yaml", output=tmp_path / "again")
    assert content(again.output) == content(result.output)


def test_report_has_the_contract(tmp_path: Path, source: Path, text: Path) -> None:
    """The keys that scripts rely on exist and agree with each other."""
    rest = f"evaluate: {{text: {json.dumps(str(text))}, tokens: 128, context: 64}}"
    result = _run(tmp_path, source, "{scheme: fp8_dynamic}", rest)
    report: dict[str, Any] = json.loads((result.output / "report.json").read_text())
    bits = 8 * report["result"]["bytes"] / report["source"]["parameters"]
    assert report["result"]["bits_per_weight"] == pytest.approx(bits)
    assert 8 < report["result"]["bits_per_target_weight"] < bits
    assert report["quality"]["perplexity"].keys() >= {"source", "result"}
    for stage in report["stages"]:
        assert stage.keys() == {"name", "wall_s", "peak_rss_bytes", "peak_device_bytes", "resumed"}
        assert stage["peak_rss_bytes"] > 0
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"]["cores"] >= 1


def test_second_run_does_nothing(tmp_path: Path, source: Path) -> None:
    """The same command again leaves the finished output as it is, to the time stamp."""
    first = _run(tmp_path, source, "{scheme: int8}")
    before = {path.name: path.stat().st_mtime_ns for path in first.output.iterdir()}
    second = _run(tmp_path, source, "{scheme: int8}")
    assert second.report == first.report
    assert {path.name: path.stat().st_mtime_ns for path in second.output.iterdir()} == before


def test_changed_evaluation_reuses_the_weights(tmp_path: Path, source: Path, text: Path) -> None:
    """A recipe that differs in its evaluation only takes the weights from the workspace."""
    _run(tmp_path, source, "{scheme: int8}")
    rest = f"evaluate: {{text: {json.dumps(str(text))}, tokens: 128, context: 64}}"
    recipe = write_recipe(tmp_path / "other.yaml", source, "{scheme: int8}", rest)
    second = compressor.run(recipe, output=tmp_path / "out" / "other")
    resumed = {stage.name: stage.resumed for stage in second.report.stages}
    assert resumed == {"stream": True, "assemble": True, "evaluate": False}


def test_changed_shard_in_the_workspace_is_noticed(tmp_path: Path, source: Path) -> None:
    """A flipped byte stops the export; the next run does the stage anew and succeeds."""
    first = _run(tmp_path, source, "{scheme: int8}")
    expected = content(first.output)
    shutil.rmtree(first.output)
    (shard,) = (tmp_path / "out" / ".compress-workspace" / "stages").glob("stream-*/model.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="has changed"):
        _run(tmp_path, source, "{scheme: int8}")
    assert not first.output.exists()
    assert content(_run(tmp_path, source, "{scheme: int8}").output) == expected


def test_fresh_does_everything_again(tmp_path: Path, source: Path) -> None:
    """--fresh replaces the finished result by the same bytes, made anew."""
    first = _run(tmp_path, source, "{scheme: int8}")
    again = compressor.run(tmp_path / "recipe.yaml", output=first.output, fresh=True)
    assert not any(stage.resumed for stage in again.report.stages)
    assert content(again.output) == content(first.output)


def test_foreign_output_folder_is_refused_and_untouched(tmp_path: Path, source: Path) -> None:
    """A folder with somebody's files in it is never written to."""
    theirs = tmp_path / "out" / "result" / "thesis.tex"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("do not lose me")
    with pytest.raises(UserError, match="not empty"):
        _run(tmp_path, source, "{scheme: int8}")
    assert theirs.read_text() == "do not lose me"
    assert list(theirs.parent.iterdir()) == [theirs]


def test_failed_gate_keeps_the_result_aside(tmp_path: Path, source: Path, text: Path) -> None:
    """Exit 1's exception, the result marked and kept, no output folder; the same again on a rerun."""
    rest = (
        f"evaluate: {{text: {json.dumps(str(text))}, tokens: 128, context: 64, "
        "gates: [{metric: kl, max_increase: 0.0000001}]}"
    )
    for _ in range(2):
        result = _run(tmp_path, source, "{scheme: nvfp4a16}", rest)
        assert not result.passed
        with pytest.raises(GateError, match="kl"):
            result.raise_if_failed()
        assert result.output == tmp_path / "out" / "result.gate-failed"
        assert not (tmp_path / "out" / "result").exists()
        assert check_manifest(result.output) == []
    # The mark is in the manifest, whatever the folder is called.
    renamed = result.output.rename(tmp_path / "fine")
    with pytest.raises(GateError, match=r"kl: FAIL: .*at most 1e-07"):
        check_publishable(renamed)
    with pytest.raises(UserError, match="no finished result"):
        check_publishable(tmp_path)


def test_uncertain_gates_warn_or_fail_as_asked(tmp_path: Path, source: Path, text: Path) -> None:
    """The bound is in the interval: by default the result is exported, with a warning."""

    def run(gate: str) -> tuple[RunResult, list[str]]:
        rest = (
            f"evaluate: {{text: {json.dumps(str(text))}, tokens: 512, context: 64, "
            f"gates: [{{metric: kl, {gate}}}], generation: {{prompts: 4, prompt_tokens: 8, new_tokens: 4}}, "
            "speed: {prompt_tokens: 8, new_tokens: 4, runs: 2}}"
        )
        recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16}", rest)
        told = _Warnings()
        return compressor.run(recipe, output=tmp_path / "out" / "result", progress=told), told.said

    first, said = run("max_increase: 1000, confidence: 95%")
    assert [gate.verdict for gate in first.report.gates] == ["PASS"]
    assert not any("gate" in words for words in said)
    check_publishable(first.output)
    quality = first.report.quality
    assert quality is not None
    assert quality.generation is not None
    assert quality.speed is not None
    assert (quality.interval_unit, quality.generation.prompts, quality.speed.runs) == ("windows", 4, 2)
    assert [document.name for document in quality.documents] == [text.name]
    assert "--continuations 4" in quality.command
    shutil.rmtree(first.output)
    bound = f"max_increase: {first.report.gates[0].value}, confidence: 95%"
    found, said = run(bound)
    (gate,) = found.report.gates
    assert (found.passed, gate.verdict, gate.units, gate.unit) == (True, "UNCERTAIN", 8, "windows")
    assert any("gate kl: UNCERTAIN" in words for words in said)
    shutil.rmtree(found.output)
    found, _ = run(f"{bound}, uncertain: fail")
    assert (found.passed, found.report.gates[0].verdict) == (False, "UNCERTAIN")
    with pytest.raises(GateError, match="UNCERTAIN"):
        check_publishable(found.output)


def test_non_finite_weight_is_named(tmp_path: Path, source: Path) -> None:
    """A NaN in one tensor stops the run with that tensor's name."""
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    shard = sorted(broken.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.removesuffix(".weight").replace(".", r"\.")):
        _run(tmp_path, broken, "{scheme: nvfp4a16}")
    assert not (tmp_path / "out" / "result").exists()


def test_indivisible_width_suggests_a_way_out(tmp_path: Path) -> None:
    """in_features that the block does not divide: the tensors and a suggestion are named."""
    folder = tmp_path / "narrow"
    tiny_llama(folder, hidden=96, intermediate=160, heads=2, kv_heads=1)
    with pytest.raises(PlanError) as caught:
        _run(tmp_path, folder, "{scheme: {kind: int4, group_size: 128}}")
    assert "down_proj" in str(caught.value)
    assert "32" in str(caught.value)


def test_mixed_schemes_reload(tmp_path: Path, source: Path, text: Path) -> None:
    """Two schemes and an ignored layer in one checkpoint are read back as they were written."""
    weights = (
        "{scheme: nvfp4a16, ignore: ['*.layers.0.self_attn.*'], "
        "rules: [{match: '*.down_proj', scheme: fp8_dynamic}, {match: lm_head, scheme: int8}]}"
    )
    rest = f"evaluate: {{text: {json.dumps(str(text))}, tokens: 256, context: 64}}"
    report = _run(tmp_path, source, weights, rest).report
    assert report.quality is not None
    assert report.quality.kl.mean < 0.25
    assert set(report.result.schemes) == {"NVFP4A16", "FP8_DYNAMIC", "W8A16"}


def test_llama4_experts_are_all_quantized_and_reload(tmp_path: Path, text: Path) -> None:
    """Fused experts are written one by one, every one of them quantized, and measured after decoding."""
    folder = tmp_path / "llama4"
    tiny_llama4(folder)
    rest = f"evaluate: {{text: {json.dumps(str(text))}, tokens: 256, context: 64}}"
    result = _run(tmp_path, folder, "{scheme: nvfp4a16}", rest)
    names = load_file(next(result.output.glob("*.safetensors"))).keys()
    assert not [name for name in names if name.endswith(("gate_up_proj", "experts.down_proj"))]
    assert [name for name in names if ".experts.0.gate_proj.weight_packed" in name]
    assert result.report.quality is not None
    assert result.report.quality.kl.mean < 0.25


def test_16_bit_head_and_tied_embedding_are_ignored_by_name(tmp_path: Path) -> None:
    """The written ignore list keeps engines from quantizing the head, tied or not."""
    folder = tmp_path / "tied"
    tiny_llama(folder, tie=True)
    result = _run(tmp_path, folder, "{scheme: nvfp4a16}")
    config = json.loads((result.output / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_exported_recipe_into_its_own_folder_does_nothing(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the text from another folder, which makes no other recipe and no other evaluation of it."""
    shutil.copy(text, tmp_path / "text.txt")
    (tmp_path / "recipes").mkdir()
    rest = "evaluate: {text: ../text.txt, tokens: 128, context: 64}"
    recipe = write_recipe(tmp_path / "recipes" / "recipe.yaml", source, "{scheme: int8}", rest)
    first = compressor.run(recipe, output=tmp_path / "out" / "result")
    assert "../../text.txt" in (first.output / "recipe.yaml").read_text()
    again = compressor.run(first.output / "recipe.yaml", output=first.output)
    assert again.report == first.report
