"""Calibrated recipes from end to end: every scheme with gptq, resume, faults found before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.errors import PlanError, UserError
from compressor.progress import Silent
from compressor.report.manifest import check_manifest
from compressor.verify.models import check_source_values
from compressor.verify.structure import check_structure
from tests.tiny import tiny_llama, tiny_llama4

from .cases import content, write_recipe

SCHEMES = [
    "nvfp4a16",
    "mxfp4",
    "fp8_dynamic",
    "fp8_block",
    "{kind: int4, group_size: 32}",
    "{kind: int4, group_size: 64, symmetric: false}",
    "int8",
]
SHOWN = "num_samples: 6, sequence_length: 64"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose widths suit every scheme."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny_llama(folder, hidden=128, intermediate=256, heads=2, kv_heads=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two texts apart, as JSON strings for YAML."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "shown.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    (folder / "measured.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return {name: json.dumps(str(folder / f"{name}.txt")) for name in ("shown", "measured")}


def _rest(texts: dict[str, str], *, measured: bool = True, more: str = "") -> str:
    evaluate = f"{{text: {texts['measured']}, tokens: 256, context: 64}}" if measured else "null"
    return f"calibration: {{datasets: [{{path: {texts['shown']}}}], {SHOWN}}}\nevaluate: {evaluate}\n{more}"


class _Interrupting(Silent):
    """Stops the run when the given block of the walk is under way."""

    def __init__(self, block: str) -> None:
        self._block = block

    def advance(self, amount: int, note: str = "") -> None:
        if note == self._block:
            raise KeyboardInterrupt


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptq_with_every_scheme(scheme: str, tmp_path: Path, source: Path, texts: dict[str, str]) -> None:
    """Runs, is reloaded by transformers, and errs less on the calibration tokens than rtn, as reported."""
    weights = f"{{scheme: {scheme}, solver: gptq}}"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, _rest(texts))
    result = compressor.run(recipe, output=tmp_path / "out" / "result")
    report = json.loads((result.output / "report.json").read_text())
    shown = report["calibration"]
    assert shown["samples"] == 6
    assert shown["sequence_length"] == 64
    assert sum(text["tokens"] for text in shown["texts"]) == 6 * 64
    assert len(shown["matrices"]) == 14
    for matrix in shown["matrices"]:
        assert matrix["output_error"] <= matrix["rtn_output_error"]
        assert matrix["tokens"] == 6 * 64
    assert sum(matrix["solver"] == "gptq" for matrix in shown["matrices"]) > 7
    assert 0 <= report["quality"]["kl"]["mean"] < 0.25
    assert [stage["name"] for stage in report["stages"]] == ["walk", "stream", "assemble", "evaluate"]
    assert check_manifest(result.output) == []
    checks = check_structure(result.output, Silent())
    checks += check_source_values(result.output, FolderSource(source), Silent())
    assert [check for check in checks if check.status != "passed"] == []
    assert "Calibration" in (result.output / "README.md").read_text()


def test_interrupted_run_goes_on(tmp_path: Path, texts: dict[str, str]) -> None:
    """Stopped inside block 1, the same command goes on there; the result is bit-identical."""
    source = tiny_llama(tmp_path / "model", layers=3)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16, solver: gptq}", _rest(texts, measured=False)
    )
    whole = compressor.run(recipe, output=tmp_path / "whole" / "out")
    output = tmp_path / "part" / "out"
    with pytest.raises(KeyboardInterrupt):
        compressor.run(recipe, output=output, progress=_Interrupting("model.layers.1"))
    assert not output.exists()
    part = compressor.run(recipe, output=output)
    assert content(part.output) == content(whole.output)
    assert part.report.stages[0].resumed
    assert not list(output.parent.rglob("kept-*"))


def test_dialects_share_a_walk(tmp_path: Path, source: Path, texts: dict[str, str]) -> None:
    """Another export format spells the same values: the walk is not done again."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16, solver: gptq}", _rest(texts, measured=False)
    )
    compressor.run(recipe, output=tmp_path / "out" / "first")
    again = compressor.run(recipe, overrides=["export.format=modelopt"], output=tmp_path / "out" / "second")
    resumed = {stage.name: stage.resumed for stage in again.report.stages}
    assert resumed["walk"]
    assert not resumed["stream"]


def test_experts_and_what_lies_in_no_block(tmp_path: Path, texts: dict[str, str]) -> None:
    """A mixture of experts walks; the output head has no data and is said to be solved by rtn."""
    source = tiny_llama4(tmp_path / "model", moe_step=2)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        source,
        "{scheme: int8, solver: gptq, rules: [{match: lm_head.weight, scheme: int8}]}",
        _rest(texts, measured=False),
    )
    plan = compressor.plan(recipe, output=tmp_path / "out")
    assert any("lm_head.weight" in warning and "rtn" in warning for warning in plan.warnings)
    result = compressor.run(recipe, output=tmp_path / "out")
    assert result.report.calibration is not None
    names = {matrix.name for matrix in result.report.calibration.matrices}
    assert "model.layers.1.feed_forward.experts.3.down_proj" in names
    assert "lm_head" not in names


def test_exported_recipe_runs_again(tmp_path: Path, texts: dict[str, str]) -> None:
    """The recipe.yaml of a result finds its texts from where it lies, and gives the same bytes."""
    source = tiny_llama(tmp_path / "model")
    (tmp_path / "shown.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        source,
        "{scheme: nvfp4a16, solver: gptq}",
        f"calibration: {{datasets: [{{path: shown.txt}}], {SHOWN}}}\nevaluate: null",
    )
    first = compressor.run(recipe, output=tmp_path / "out" / "first")
    again = compressor.run(first.output / "recipe.yaml", output=tmp_path / "other" / "again")
    weights = [(run.output / "model.safetensors").read_bytes() for run in (first, again)]
    assert weights[0] == weights[1]


def test_faults_are_found_before_the_work(tmp_path: Path, source: Path, texts: dict[str, str]) -> None:
    """A missing file; calibration on the evaluation text; rows longer than the model's context."""
    datasets = f"[{{path: {texts['measured']}}}, {{path: nowhere.txt}}]"
    rest = (
        f"calibration: {{datasets: {datasets}, num_samples: 1, sequence_length: 600}}\n"
        f"evaluate: {{text: {texts['measured']}, tokens: 256, context: 64}}"
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16, solver: gptq}", rest)
    with pytest.raises(PlanError, match=r"nowhere\.txt"):
        compressor.plan(recipe, output=tmp_path / "out")
    recipe.write_text(recipe.read_text().replace(", {path: nowhere.txt}", ""))
    with pytest.raises(PlanError) as raised:
        compressor.plan(recipe, output=tmp_path / "out")
    assert len(raised.value.faults) == 2
    assert "evaluation" in str(raised.value)
    assert "600" in str(raised.value)


def test_too_little_text(tmp_path: Path, source: Path, texts: dict[str, str]) -> None:
    """A text with fewer tokens than asked for is an error that counts both."""
    rest = f"calibration: {{datasets: [{{path: {texts['shown']}}}], num_samples: 400}}\nevaluate: null"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16, solver: gptq}", rest)
    with pytest.raises(UserError, match="num_samples"):
        compressor.run(recipe, output=tmp_path / "out")


def test_section_without_effect_is_warned_of(tmp_path: Path, source: Path, texts: dict[str, str]) -> None:
    """Calibration texts with solvers that need none."""
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16}", _rest(texts))
    plan = compressor.plan(recipe, output=tmp_path / "out")
    assert any("calibration" in warning for warning in plan.warnings)
    assert plan.walk is None
