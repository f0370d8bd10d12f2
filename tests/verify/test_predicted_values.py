"""Prediction layers that were trained on the result may differ from the source within bounds; no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.progress import Silent
from compressor.verify.base import Check
from compressor.verify.models import check_source_values
from tests.e2e.cases import write_recipe
from tests.model.published import PUBLISHED

DRAFTS = "evaluate: null\ndrafts: {kind: native, train: {}}"
MEASURED = {"loss": 1.0, "losses": [1.0], "accepted": [0.5], "places": 9, "length": 1.5}
NOTHING: list[float] = []
TRAINED: dict[str, Any] = (
    {"texts": [], "written": 0, "temperature": None, "looping": 0, "by_text": {}, "seconds": 1.0}
    | dict.fromkeys(("rows", "held_out_rows", "sequence_length", "parameters", "batch"), 1)
    | {"planned_steps": 4, "steps": 4, "before": MEASURED, "after": MEASURED}
    | dict.fromkeys(("losses", "lengths", "held_out_steps", "held_out_losses", "held_out_lengths"), NOTHING)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FolderSource]:
    """A result that carries its prediction layer, and quantizes a matrix of it."""
    folder = tmp_path_factory.mktemp("predicted")
    source = PUBLISHED["qwen3_next"](folder / "model")
    rules = "[{match: 'mtp.*.o_proj', scheme: nvfp4a16, solver: rtn}]"
    recipe = write_recipe(folder / "recipe.yaml", source, f"{{scheme: nvfp4a16, rules: {rules}}}")
    return compressor.run(recipe, output=folder / "out").output, FolderSource(source)


def checks(folder: Path, source: FolderSource) -> dict[str, Check]:
    """By name."""
    return {check.name: check for check in check_source_values(folder, source, Silent())}


def told(made: Path, folder: Path, rest: str, best_step: int) -> Path:
    """A copy whose recipe ends in ``rest``, and whose report says that a layer was trained."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    report = json.loads((folder / "report.json").read_text())
    training = TRAINED | {"best_step": best_step}
    drafts = {"kind": "native", "tokens": 3, "bytes": 0, "model": None, "decoding": None}
    report["drafts"] = drafts | {"training": training}
    (folder / "report.json").write_text(json.dumps(report))
    write_recipe(folder / "recipe.yaml", Path("model"), "{scheme: nvfp4a16}", rest)
    return folder


def moved(folder: Path, name: str, by: float) -> None:
    """Adds noise of ``by`` of the tensor's size, or of one's where it is a vector."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    size = tensors[name].float().square().mean().sqrt() if tensors[name].dim() > 1 else torch.tensor(1.0)
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    tensors[name] = (tensors[name].float() + by * size * noise).to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.mlp.gate.weight"])
def test_trained_tensors_pass_within_bounds(
    made: tuple[Path, FolderSource], name: str, tmp_path: Path
) -> None:
    """A tenth of its size is training; twice its size is not."""
    folder = told(made[0], tmp_path, DRAFTS, 4)
    moved(folder, name, 0.1)
    found = checks(folder, made[1])
    assert {check.status for check in found.values()} == {"passed"}
    assert "1 was trained to foretell this result" in found["copies"].detail
    moved(folder, name, 2.0)
    assert checks(folder, made[1])["copies"].status == "failed"


def test_a_trained_matrix_that_is_quantized_passes(made: tuple[Path, FolderSource], tmp_path: Path) -> None:
    """It need not be the nearest to the source's any more."""
    folder = told(made[0], tmp_path, DRAFTS, 4)
    found = checks(folder, made[1])
    assert found["weights"].status == "passed"
    assert "1 of them to about that, trained to foretell this result" in found["weights"].detail


@pytest.mark.parametrize(
    ("name", "rest", "best_step"),
    [
        ("model.layers.0.input_layernorm.weight", DRAFTS, 4),  # of the model itself
        ("mtp.fc.weight", "evaluate: null", 4),  # a report alone
        ("mtp.fc.weight", "evaluate: null\ndrafts: {kind: native}", 4),  # a recipe that only measures
        ("mtp.fc.weight", DRAFTS, 0),  # the first values were the best
    ],
)
def test_nothing_else_may_differ(
    made: tuple[Path, FolderSource], name: str, rest: str, best_step: int, tmp_path: Path
) -> None:
    """Neither the report nor the recipe alone is believed, and the model's own tensors are its source's."""
    folder = told(made[0], tmp_path, rest, best_step)
    moved(folder, name, 0.1)
    assert checks(folder, made[1])["copies"].status == "failed"


def test_a_run_that_trains_one_is_verified(tmp_path: Path) -> None:
    """With what the run itself reports; and not with the recipe of one that does not train."""
    source = PUBLISHED["qwen3_next"](tmp_path / "model")
    (tmp_path / "shown.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 60)
    train = "{data: text, sequence_length: 32, tokens: 256, batch: 4, held_out_rows: 4, learning_rate: 0.005}"
    rest = f"drafts: {{kind: native, train: {train}}}\ncalibration: {{datasets: [{{path: shown.txt}}]}}"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16}", f"{rest}\nevaluate: null")
    result = compressor.run(recipe, output=tmp_path / "out").output
    found = checks(result, FolderSource(source))
    assert {check.status for check in found.values()} == {"passed"}
    assert "were trained to foretell this result" in found["copies"].detail
    write_recipe(result / "recipe.yaml", Path("model"), "{scheme: nvfp4a16}")
    assert checks(result, FolderSource(source))["copies"].status == "failed"
