"""Recipes whose blocks are learned, from end to end: the result, its report, and what the plan refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.errors import PlanError
from compressor.planner import calibrated
from compressor.progress import Silent
from compressor.verify.models import check_source_values
from compressor.verify.structure import check_structure
from tests.tiny import tiny_llama

from .cases import write_recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    return tiny_llama(tmp_path_factory.mktemp("source") / "model", layers=2)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sections of a recipe besides ``model`` and ``weights``."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "shown.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    path = json.dumps(str(folder / "shown.txt"))
    shown = f"[{{path: {path}}}], num_samples: 16, sequence_length: 64"
    return f"calibration: {{datasets: {shown}}}\nevaluate: null\n"


def test_gptq_then_learned(tmp_path: Path, source: Path, rest: str) -> None:
    """Loads, its values are near the source's, and the report says how near each block came."""
    weights = "{scheme: nvfp4a16, solver: gptq+learned}"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, rest)
    result = compressor.run(recipe, output=tmp_path / "out")
    report = json.loads((result.output / "report.json").read_text())
    blocks = report["calibration"]["blocks"]
    assert [block["name"] for block in blocks] == ["model.layers.0", "model.layers.1"]
    assert all(0 < block["after"] <= block["before"] < 1 for block in blocks)
    assert all(block["tokens"] == 2 * 64 for block in blocks)
    solvers = {matrix["solver"] for matrix in report["calibration"]["matrices"]}
    assert solvers <= {"gptq+learned", "gptq", "learned", "rtn"}
    assert "Block reconstruction error" in (result.output / "README.md").read_text()
    checks = check_structure(result.output, Silent())
    checks += check_source_values(result.output, FolderSource(source), Silent())
    assert [check for check in checks if check.status != "passed"] == []
    again = compressor.run(result.output / "recipe.yaml", output=tmp_path / "again")
    shards = [(run.output / "model.safetensors").read_bytes() for run in (result, again)]
    assert shards[0] == shards[1]


def test_one_block_is_learned_in_one_way(tmp_path: Path, source: Path, rest: str) -> None:
    """Rules with different options inside a block are a fault of the plan; starts may differ."""
    rule = "rules: [{match: '*.down_proj', scheme: int8, solver: {kind: learned, %s}}]"
    weights = "{scheme: nvfp4a16, solver: {kind: learned, start: gptq}, %s}"
    faulty = write_recipe(tmp_path / "faulty.yaml", source, weights % (rule % "steps: 7"), rest)
    with pytest.raises(PlanError, match="block 0 with two sets of options"):
        compressor.plan(faulty)
    compressor.plan(write_recipe(tmp_path / "fine.yaml", source, weights % (rule % "start: rtn"), rest))


def test_plan_refuses_and_warns(
    tmp_path: Path, source: Path, rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence is a fault; blocks that take too much memory are a warning."""
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16, solver: learned}", rest)
    monkeypatch.setattr(calibrated, "_LEARN_SHARE", 0.0)
    assert any("to learn blocks 0, 1:" in warning for warning in compressor.plan(recipe).warnings)
    write_recipe(
        tmp_path / "one.yaml",
        source,
        "{scheme: nvfp4a16, solver: learned}",
        rest.replace("num_samples: 16", "num_samples: 1"),
    )
    with pytest.raises(PlanError, match=r"one.yaml:\d+.*there is only one"):
        compressor.plan(tmp_path / "one.yaml")


def test_learned_from_plain_rounding_is_reported(tmp_path: Path, source: Path, rest: str) -> None:
    """Every matrix is in the report, although nobody measured its inputs."""
    weights = "{scheme: nvfp4a16, solver: {kind: learned, steps: 20}}"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, rest)
    result = compressor.run(recipe, output=tmp_path / "out")
    facts = result.report.calibration
    assert facts is not None
    assert len(facts.matrices) == 2 * 7
    assert {matrix.solver for matrix in facts.matrices} <= {"learned", "rtn"}
    assert {(matrix.tokens, matrix.output_error) for matrix in facts.matrices} == {(None, None)}
    assert "learned" in (result.output / "README.md").read_text()
