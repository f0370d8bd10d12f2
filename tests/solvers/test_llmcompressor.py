"""What a recipe may say of llm-compressor's modifiers, and what the plan makes of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.calibration.spec import CalibrationSpec
from compressor.errors import PlanError
from compressor.planner import oneshot
from compressor.planner.oneshot import oneshot_key
from compressor.planner.plan import Plan, make_plan
from compressor.recipe.load import load_recipe
from compressor.solvers import parse_solver
from compressor.solvers.llmcompressor import LlmCompressor
from tests.model.published import PUBLISHED
from tests.tiny import tiny_llama


def _solver(*modifiers: Any) -> LlmCompressor:
    solver = parse_solver({"kind": "llmcompressor", "modifiers": list(modifiers)})
    assert isinstance(solver, LlmCompressor)
    return solver


def test_names_and_maps_are_one_spelling() -> None:
    """A name, a map to nothing and a map to no options are the same; what is dumped can be read again."""
    assert _solver("GPTQModifier") == _solver({"GPTQModifier": None}) == _solver({"GPTQModifier": {}})
    solver = _solver({"SmoothQuantModifier": {"smoothing_strength": 0.8}}, "GPTQModifier")
    assert parse_solver(solver.model_dump(mode="json")) == solver
    assert solver.needs_calibration
    assert [name for name, _ in solver.named] == ["SmoothQuantModifier", "GPTQModifier"]
    assert solver.transforms
    assert solver.overwrites


def test_a_quantizer_is_added_after_transforms() -> None:
    """Transforms alone store nothing."""
    solver = _solver("AWQModifier")
    assert solver.named == (("AWQModifier", {}), ("QuantizationModifier", {}))
    assert solver.transforms
    assert not solver.overwrites
    assert not _solver("GPTQModifier").transforms


@pytest.mark.parametrize(
    ("modifiers", "told"),
    [
        (["GTPQModifier"], "unknown modifier 'GTPQModifier'; did you mean 'GPTQModifier'.*AutoRoundModifier"),
        (["WandaPruningModifier"], "prunes"),
        (["QuIPModifier"], "rotates activations"),
        ([{"SpinQuantModifier": {"rotations": ["R1", "r4"]}}], "R3, R4"),
        ([{"GPTQModifier": {"scheme": "W4A16"}}], "'scheme'.*recipe's own"),
        ([{"GPTQModifier": {"ignore": ["lm_head"]}}], "'ignore'"),
        ([{"QuantizationModifier": {"targets": ["Linear"]}}], "'targets'"),
        ([{"AutoRoundModifier": {"config_groups": {}}}], "'config_groups'"),
        ([{"QuantizationModifier": {"kv_cache_scheme": {}}}], "'kv_cache_scheme'"),
        ([{"GPTQModifier": {"actorder": "group"}}], "actorder"),
        (["GPTQModifier", "AutoRoundModifier"], "the last"),
        (["GPTQModifier", "SmoothQuantModifier"], "the last"),
        ([{"GPTQModifier": {}, "AWQModifier": {}}], "one name"),
        ([], "at least 1"),
    ],
)
def test_refused_in_the_recipe(modifiers: list[Any], told: str) -> None:
    """Each with what is wrong."""
    with pytest.raises(ValueError, match=told):
        _solver(*modifiers)


def test_smoothing_may_leave_norms_out() -> None:
    """There ``ignore`` names norms, not what is quantized."""
    assert _solver({"SmoothQuantModifier": {"ignore": ["model.norm"]}}).transforms


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    return tiny_llama(tmp_path_factory.mktemp("solver") / "model")


def _plan(place: Path, folder: Path, weights: str) -> Plan:
    text = place / "shown.txt"
    text.write_text("Five wizards quickly jump over my boxed vintage. " * 20)
    path = place / "recipe.yaml"
    path.write_text(
        f"name: tiny\nmodel: {{source: '{folder}'}}\nweights: {weights}\n"
        f"calibration: {{datasets: [{{path: '{text}'}}], num_samples: 2, sequence_length: 32}}\n"
        "evaluate: null\n"
    )
    return make_plan(load_recipe(str(path), ()), output=place / "out")


def _weights(*modifiers: str, more: str = "") -> str:
    return f"{{scheme: nvfp4, solver: {{kind: llmcompressor, modifiers: [{', '.join(modifiers)}]}}{more}}}"


def test_plan(tmp_path: Path, folder: Path) -> None:
    """No walk: its own stage, with memory for the whole model, keyed by options, tokens and versions."""
    plan = _plan(tmp_path, folder, _weights("GPTQModifier", more=", ignore: [lm_head]"))
    assert plan.walk is None
    assert plan.oneshot is not None
    assert isinstance(plan.calibration, CalibrationSpec)
    parameters = sum(claim.tensor.numel for claim in plan.claims)
    assert plan.oneshot.load_bytes == 4 * parameters
    key = oneshot_key(plan.oneshot, plan.claims, "source")
    other = _plan(tmp_path, folder, _weights("'GPTQModifier': {block_size: 64}"))
    assert other.oneshot is not None
    assert oneshot_key(other.oneshot, other.claims, "source") != key


def test_key_counts_the_version(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release of the library may choose other values."""
    plan = _plan(tmp_path, folder, _weights("GPTQModifier"))
    assert plan.oneshot is not None
    key = oneshot_key(plan.oneshot, plan.claims, "source")
    monkeypatch.setattr(oneshot, "version", lambda package: "99.0")
    assert oneshot_key(plan.oneshot, plan.claims, "source") != key


def test_head_is_quantized_by_it_too(tmp_path: Path, folder: Path) -> None:
    """What lies in no block has this solver as well, unlike with the walk."""
    rules = ", rules: [{match: lm_head, scheme: fp8_dynamic, solver: {kind: llmcompressor, modifiers: [%s]}}]"
    plan = _plan(tmp_path, folder, _weights("QuantizationModifier", more=rules % "QuantizationModifier"))
    [head] = [claim for claim in plan.claims if claim.role.kind == "lm_head"]
    assert isinstance(head.solver, LlmCompressor)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (", rules: [{match: '*.down_proj', scheme: nvfp4, solver: rtn}]", "and solver rtn"),
        (
            ", rules: [{match: '*.down_proj', scheme: nvfp4, solver: "
            "{kind: llmcompressor, modifiers: [QuantizationModifier]}}]",
            "with other modifiers",
        ),
        (", polish: {}", "polish"),
    ],
)
def test_faults_of_the_plan(tmp_path: Path, folder: Path, more: str, told: str) -> None:
    """Mixtures that the library's one pass over the model cannot give."""
    with pytest.raises(PlanError, match=told):
        _plan(tmp_path, folder, _weights("GPTQModifier", more=more))


def test_tied_models_are_not_rotated(tmp_path: Path) -> None:
    """Their one tensor would have to become two."""
    folder = tiny_llama(tmp_path / "tied", tie=True)
    _plan(tmp_path, folder, _weights("SmoothQuantModifier"))
    with pytest.raises(PlanError, match="one tensor for both"):
        _plan(tmp_path, folder, _weights("SpinQuantModifier"))


def test_models_whose_prediction_layer_stays_are_not_rotated(tmp_path: Path) -> None:
    """It reads the model's hidden states as they were."""
    folder = PUBLISHED["qwen3_5"](tmp_path / "predicts")
    with pytest.raises(PlanError, match="it would foretell nothing"):
        _plan(tmp_path, folder, _weights("SpinQuantModifier"))


def test_missing_library(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan says what to install, and where the recipe asks for it."""
    real = importlib.util.find_spec
    monkeypatch.setattr(oneshot, "find_spec", lambda name: None if name == "llmcompressor" else real(name))
    with pytest.raises(PlanError, match=r"recipe.yaml:3.*\n.*pip install 'compressor\[llmcompressor\]'"):
        _plan(tmp_path, folder, _weights("GPTQModifier"))


def test_reading_a_recipe_does_not_import_it() -> None:
    """It takes seconds and prints; the file of the solver names it only."""
    import subprocess

    code = (
        "import sys; from compressor.solvers import parse_solver; "
        "parse_solver({'kind': 'llmcompressor', 'modifiers': ['GPTQModifier']}); "
        "assert not {'llmcompressor', 'torch'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
