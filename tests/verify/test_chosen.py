"""A report that names changed tensors is believed as far as the recipe changes any, and within bounds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressor
from compressor.checkpoint.folder import FolderSource
from compressor.progress import Silent
from compressor.verify.base import Check
from compressor.verify.models import check_source_values
from compressor.verify.transformed import sane_factors, sane_size, unscaled
from tests.e2e.cases import write_recipe
from tests.tiny import tiny_llama

NORM = "model.layers.{}.{}_layernorm.weight"
FED = {"input": ("q_proj", "k_proj", "v_proj"), "post_attention": ("gate_proj", "up_proj")}
SMOOTH = "{kind: llmcompressor, modifiers: [SmoothQuantModifier]}"
ROTATE = "{kind: llmcompressor, modifiers: [SpinQuantModifier]}"
SHOWN = {"texts": [], "samples": 1, "sequence_length": 1, "seed": 0, "dtype": "float32", "matrices": []}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FolderSource, list[str]]:
    """A result of weights whose channels were scaled by up to thirty times, its source, and its norms."""
    folder = tmp_path_factory.mktemp("scaled")
    source = tiny_llama(folder / "model")
    smoothed = Path(shutil.copytree(source, folder / "smoothed"))
    tensors = load_file(smoothed / "model.safetensors")
    norms = []
    random = torch.Generator().manual_seed(0)
    for layer in range(2):
        for norm, fed in FED.items():
            name = NORM.format(layer, norm)
            factor_I = torch.exp(torch.randn(64, generator=random)).clamp(0.03, 30)
            tensors[name] = (tensors[name].float() / factor_I).to(torch.bfloat16)
            norms.append(name)
            for leaf in fed:
                room = "self_attn" if norm == "input" else "mlp"
                weight = f"model.layers.{layer}.{room}.{leaf}.weight"
                tensors[weight] = (tensors[weight].float() * factor_I).to(torch.bfloat16)
    save_file(tensors, smoothed / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(folder / "recipe.yaml", smoothed, "{scheme: nvfp4a16}")
    return compressor.run(recipe, output=folder / "out" / "result").output, FolderSource(source), norms


def _told(made: tuple[Path, FolderSource, list[str]], folder: Path, solver: str, named: list[str]) -> Path:
    """A copy of the result whose recipe has ``solver`` and whose report names ``named``."""
    for path in made[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    report = json.loads((folder / "report.json").read_text())
    report["calibration"] = {**SHOWN, "changed_16bit": named}
    (folder / "report.json").write_text(json.dumps(report))
    write_recipe(folder / "recipe.yaml", Path("model"), f"{{scheme: nvfp4a16, solver: {solver}}}")
    return folder


def _checks(folder: Path, source: FolderSource) -> dict[str, Check]:
    return {check.name: check for check in check_source_values(folder, source, Silent())}


def _edit(folder: Path, name: str, values: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = values.to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_scaled_channels_are_compared_up_to_factors(
    made: tuple[Path, FolderSource, list[str]], tmp_path: Path
) -> None:
    """Norms within bounds, matrices as near as any after a factor for each row and column."""
    found = _checks(_told(made, tmp_path, SMOOTH, made[2]), made[1])
    assert [check.status for check in found.values()] == ["passed", "passed"]
    assert "a factor for each row and column" in found["weights"].detail
    assert "4 were changed by a transform and not compared bit for bit" in found["copies"].detail


@pytest.mark.parametrize("solver", ["gptq", "rtn"])
def test_a_report_alone_changes_nothing(
    made: tuple[Path, FolderSource, list[str]], tmp_path: Path, solver: str
) -> None:
    """Where no solver of the recipe transforms, what the report names is compared like all else."""
    found = _checks(_told(made, tmp_path, solver, made[2]), made[1])
    assert [check.status for check in found.values()] == ["failed", "failed"]
    assert "than polish or transform of recipe.yaml" in found["copies"].detail


def test_a_folder_without_a_recipe_changes_nothing(
    made: tuple[Path, FolderSource, list[str]], tmp_path: Path
) -> None:
    """The same."""
    (_told(made, tmp_path, SMOOTH, made[2]) / "recipe.yaml").unlink()
    assert _checks(tmp_path, made[1])["copies"].status == "failed"


@pytest.mark.parametrize("damage", ["embedding", "nan", "sign", "swapped", "packed"])
def test_damage_is_not_hidden_by_a_report(
    made: tuple[Path, FolderSource, list[str]], tmp_path: Path, damage: str
) -> None:
    """The report names every tensor, and the recipe smooths; yet the damage is found."""
    folder = _told(made, tmp_path, SMOOTH, [*made[2], *made[1].headers])
    tensors = load_file(folder / "model.safetensors")
    norm, packed = made[2][0], "model.layers.1.mlp.down_proj.weight_packed"
    values = {
        "embedding": (EMBEDDING, tensors[EMBEDDING] * 2),
        "nan": (norm, tensors[norm].float() * float("nan")),
        "sign": (norm, -tensors[norm]),
        "swapped": (packed, tensors[packed].roll(1, 0)),
        "packed": (packed, torch.where(torch.arange(64) % 8 == 0, 0x77, tensors[packed])),
    }
    _edit(folder, *values[damage])
    found = _checks(folder, made[1])
    failed = {name for name, check in found.items() if check.status == "failed"}
    assert failed == {"weights" if damage in ("swapped", "packed") else "copies"}


def test_rotated_matrices_are_bounded_by_size(
    made: tuple[Path, FolderSource, list[str]], tmp_path: Path
) -> None:
    """And the check says how many were not compared, and why; one that has lost its size fails."""
    folder = _told(made, tmp_path, ROTATE, made[2])
    found = _checks(folder, made[1])
    assert found["weights"].status == "skipped"
    assert "14 matrices were not compared value by value: the recipe rotates them" in found["weights"].detail
    assert found["copies"].status == "passed"
    scale = "model.layers.1.mlp.down_proj.weight_global_scale"
    _edit(folder, scale, load_file(folder / "model.safetensors")[scale] * 1000)
    assert _checks(folder, made[1])["weights"].status == "failed"


def test_factors_are_found() -> None:
    """To a thousandth, for a matrix that is another one's with rows and columns multiplied."""
    random = torch.Generator().manual_seed(1)
    source_OI = torch.randn(48, 80, generator=random)
    row_O1, column_1I = (torch.exp(torch.randn(*shape, generator=random)) for shape in ((48, 1), (1, 80)))
    ours_OI = row_O1 * source_OI * column_1I
    found_OI = unscaled(ours_OI, source_OI)
    assert found_OI is not None
    torch.testing.assert_close(found_OI, ours_OI, rtol=1e-3, atol=1e-3)
    assert unscaled(-ours_OI, source_OI) is None
    assert unscaled(torch.full_like(ours_OI, float("nan")), source_OI) is None


def test_lost_channels() -> None:
    """Channels that rounded to zero are few; other factors that no smoothing makes are fewer."""
    source_OI = torch.randn(256, 200, generator=torch.Generator().manual_seed(2))
    for columns, factor, plausible in ((10, 0.0, True), (11, 0.0, False), (2, -1.0, True), (3, -1.0, False)):
        ours_OI = source_OI.clone()
        ours_OI[:, :columns] *= factor
        found_OI = unscaled(ours_OI, source_OI)
        assert (found_OI is not None) == plausible
        if found_OI is not None:
            torch.testing.assert_close(found_OI, ours_OI, rtol=1e-5, atol=1e-5)


def test_bounds_of_size_and_factors() -> None:
    """Zeros stay zero; nothing changes its sign; NaN and infinities are out of every bound."""
    source = torch.tensor([1.0, -2.0, 0.0])
    assert sane_factors(source * 30, source)
    for wrong in (-source, source + 1, source * 1e4, source * float("nan"), source * float("inf")):
        assert not sane_factors(wrong, source)
    assert sane_size(-source * 30, source)
    for wrong in (source * 100, source / 100, source * float("nan"), source * float("inf")):
        assert not sane_size(wrong, source)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            "{scheme: {kind: int4, group_size: 32}, solver: smooth+gptq, ignore: ['*.1.self_attn.*']}",
            "factor",
        ),
        ("{scheme: nvfp4, solver: {kind: learned, start: gptq, steps: 20}}", "not by rounding to nearest"),
    ],
)
def test_results_of_this_tool_pass(tmp_path: Path, weights: str, said: str) -> None:
    """With their own recipe and report."""
    source = tiny_llama(tmp_path / "model")
    (tmp_path / "shown.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        source,
        weights,
        "calibration: {datasets: [{path: shown.txt}], num_samples: 8, sequence_length: 64}\nevaluate: null",
    )
    found = _checks(compressor.run(recipe, output=tmp_path / "out" / "result").output, FolderSource(source))
    assert [check.status for check in found.values()] == ["passed", "passed"]
    assert said in found["weights"].detail
