"""Smoothed recipes from end to end: the result, its report, resume, verification, and a polish after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.progress import Silent
from compressor.verify.models import check_source_values
from compressor.verify.structure import check_structure
from tests.tiny import tiny_llama

from .cases import content, write_recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose hidden states have channels that stand out."""
    folder = tiny_llama(tmp_path_factory.mktemp("source") / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, [3, 17, 40]] *= 100
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Calibration and evaluation on two texts apart."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "shown.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    (folder / "measured.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    shown, measured = (json.dumps(str(folder / f"{name}.txt")) for name in ("shown", "measured"))
    return (
        f"calibration: {{datasets: [{{path: {shown}}}], num_samples: 6, sequence_length: 64}}\n"
        f"evaluate: {{text: {measured}, tokens: 256, context: 64}}"
    )


class _Interrupting(Silent):
    """Stops the run when the given block of the walk is under way."""

    def __init__(self, block: str) -> None:
        self._block = block

    def advance(self, amount: int, note: str = "") -> None:
        if note == self._block:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "weights",
    [
        "{scheme: nvfp4a16, solver: smooth}",
        "{scheme: nvfp4, solver: smooth+gptq}",
        "{scheme: {kind: int4, group_size: 32}, solver: smooth, polish: {steps: 8, tokens: 128}}",
    ],
)
def test_smoothed_result(weights: str, tmp_path: Path, source: Path, rest: str) -> None:
    """Is reloaded by transformers and verified against its source; the report says what was folded where."""
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, rest)
    result = compressor.run(recipe, output=tmp_path / "out")
    report = json.loads((result.output / "report.json").read_text())
    facts = report["calibration"]
    moved = [found for found in facts["smoothed"] if found["ratio"] is not None]
    assert len(facts["smoothed"]) == 8
    assert moved
    for found in facts["smoothed"]:
        before, after = (
            sum(each[f"error_{when}"] for each in found["matrices"]) for when in ("before", "after")
        )
        assert (after < before) == (found in moved)
        assert (found["note"] is None) == (found in moved)
    norms = {found["made_by"] for found in moved if "norm" in found["made_by"]}
    assert set(facts["changed_16bit"]) == norms
    stored = load_file(result.output / "model.safetensors")
    original = load_file(source / "model.safetensors")
    if "polish" not in weights:
        assert {
            name for name in original if name in stored and stored[name].ne(original[name]).any()
        } == norms
    assert not any("smoothing" in name for name in stored)
    solvers = {matrix["solver"] for matrix in facts["matrices"]}
    assert solvers & {"smooth", "smooth+gptq"}
    assert 0 <= report["quality"]["kl"]["mean"] < 0.3
    assert "Smoothing: scales of" in (result.output / "README.md").read_text()
    checks = check_structure(result.output, Silent())
    checks += check_source_values(result.output, FolderSource(source), Silent())
    assert [check for check in checks if check.status != "passed"] == []


def test_interrupted_run_goes_on(tmp_path: Path, source: Path, rest: str) -> None:
    """Stopped inside block 1, the same command goes on there; the result is bit-identical."""
    rest = rest.partition("\nevaluate")[0] + "\nevaluate: null"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16, solver: smooth+gptq}", rest)
    whole = compressor.run(recipe, output=tmp_path / "whole" / "out")
    output = tmp_path / "part" / "out"
    with pytest.raises(KeyboardInterrupt):
        compressor.run(recipe, output=output, progress=_Interrupting("model.layers.1"))
    part = compressor.run(recipe, output=output)
    assert part.report.stages[0].resumed
    assert content(part.output) == content(whole.output)


def test_plan_counts_the_same_bytes(tmp_path: Path, source: Path, rest: str) -> None:
    """Smoothing changes values, never what is stored: the plan's bytes are those of plain rounding."""
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16, solver: smooth}", rest)
    smooth = compressor.plan(recipe, output=tmp_path / "out")
    plain = compressor.plan(recipe, overrides=["weights.solver=rtn"], output=tmp_path / "out")
    assert smooth.prediction.result_bytes == plain.prediction.result_bytes
    assert smooth.walk is not None
    assert plain.walk is None
