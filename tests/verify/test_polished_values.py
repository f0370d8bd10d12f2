"""A polished folder's values: norms may have moved a little where its report says so, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.progress import Silent
from compressor.verify.models import check_source_values
from tests.e2e.cases import write_recipe
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FolderSource]:
    """A polished result, and its source."""
    folder = tmp_path_factory.mktemp("polished")
    source = tiny_llama(folder / "model")
    (folder / "shown.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    recipe = write_recipe(
        folder / "recipe.yaml",
        source,
        "{scheme: nvfp4a16, polish: {steps: 20, learning_rate: 0.01, tokens: 512}}",
        "calibration: {datasets: [{path: shown.txt}], num_samples: 16, sequence_length: 64}\nevaluate: null",
    )
    return compressor.run(recipe, output=folder / "out" / "result").output, FolderSource(source)


def _failed(folder: Path, source: FolderSource) -> set[str]:
    return {c.name for c in check_source_values(folder, source, Silent()) if c.status == "failed"}


def test_polished_values_pass(made: tuple[Path, FolderSource]) -> None:
    """With its own report."""
    assert _failed(*made) == set()


def test_norms_fail_where_no_report_names_them(made: tuple[Path, FolderSource], tmp_path: Path) -> None:
    """The same values without the report's word are damage."""
    folder, source = made
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    report = json.loads((tmp_path / "report.json").read_text())
    report["calibration"]["polish"]["changed_16bit"] = ["model.layers.0.input_layernorm.weight"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert _failed(tmp_path, source) == {"copies"}


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_moved_too_far(made: tuple[Path, FolderSource], tmp_path: Path, factor: float) -> None:
    """A norm half as large again is no polish."""
    folder, source = made
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = (tensors["model.norm.weight"].float() * factor).to(torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert _failed(tmp_path, source) == {"copies"}
