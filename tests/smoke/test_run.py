"""Smoke runs from end to end, and what they leave alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from compressor.cli.main import cli
from compressor.errors import PlanError, UserError
from compressor.planner.plan import make_plan
from compressor.progress import Silent
from compressor.recipe.load import load_recipe, shipped_recipes
from compressor.smoke.run import Smoke, smoke
from tests.checkpoint.fake_hub import REPO, serve
from tests.model.zoo import FAMILIES
from tests.tiny import tiny_llama

from .full_size import CONFIGS, write_headers

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here asks the real Hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOWHERE)


def _recipe(folder: Path, model: str, weights: str, rest: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(f"name: job\nmodel: {model}\nweights: {weights}\n{rest}\n")
    return path


def _smoked(recipe: str | Path, output: Path) -> Smoke:
    return smoke(make_plan(load_recipe(str(recipe)), output=output), Silent())


def _said(recipe: Path, output: Path, *more: str) -> Result:
    return CliRunner().invoke(cli, ["run", str(recipe), "--smoke", "--output", str(output), "-q", *more])


def _left(folder: Path) -> set[str]:
    """Every file below, but the lock of smoke runs."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return files - {".compress-workspace/smoke/lock"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "gptq" in name else ()) for name, _ in shipped_recipes()],
)
def test_shipped_recipes(name: str, tmp_path: Path) -> None:
    """Each runs on a small model, where no Hub answers from shipped headers, and leaves nothing behind."""
    found = _smoked(name, tmp_path / "out")
    assert found.report.quality is not None
    assert {"stream", "assemble", "evaluate"} <= {stage.name for stage in found.report.stages}
    assert found.unmet == ()
    assert found.tokenizer.startswith("the source's" if "smollm2" in name else "bytes")
    assert _left(tmp_path) == set()


def test_training_is_cut_short(tmp_path: Path) -> None:
    """Positions are scaled and adapters trained, in few steps of short sequences."""
    source = FAMILIES["llama_tied"](tmp_path / "model")
    rest = "context: {method: yarn, target_length: 2048}\nadapters: {documents: long.txt, rank: 4}"
    recipe = _recipe(tmp_path / "job", f"{{source: {source}}}", "{scheme: nvfp4a16}", rest)
    (recipe.parent / "long.txt").write_text("the cat sat on the mat and the dog sat on the cat. " * 40)
    evaluate = "\nevaluate: {tokens: 256, context: 64}\n"
    recipe.write_text(recipe.read_text() + evaluate)
    found = _smoked(recipe, tmp_path / "out")
    assert found.report.adapters is not None
    assert found.report.adapters.sequence_length * len(found.report.adapters.losses) == 256


SLOW = ("llama4", "jamba", "mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v3")
PREDICT = ("qwen3_next", "qwen3_5_moe", "glm4_moe", "deepseek_v3")


@pytest.mark.parametrize(
    "family", ["qwen3_next", "glm4_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_families(family: str, tmp_path: Path) -> None:
    """Hybrids and mixtures of experts, walked: every kind of layer is calibrated, experts too.

    With their prediction layers, which the run would not lose (``stages.assemble``).
    """
    headers = write_headers(tmp_path / "headers", CONFIGS[family](), predicts=family in PREDICT)
    model = f"{{source: {REPO}, headers: {headers}}}"
    recipe = _recipe(tmp_path, model, "{scheme: fp8_static, solver: gptq}", "evaluate: null")
    found = _smoked(recipe, tmp_path / "o" / "out")
    assert [stage.name for stage in found.report.stages] == ["walk", "stream", "assemble", "evaluate"]
    assert found.report.calibration is not None
    modules = [matrix.name for matrix in found.report.calibration.matrices]
    for index in range(found.layers.kept):
        assert any(f".layers.{index}." in module for module in modules)
    assert any(".experts." in module for module in modules)
    assert not found.measured
    assert found.report.quality is not None


def test_a_wrapper_of_full_size(tmp_path: Path) -> None:
    """Gemma 3 with its tower: transformers calls every module otherwise than the checkpoint."""
    headers = write_headers(tmp_path / "headers", CONFIGS["gemma3"]())
    model = f"{{source: {REPO}, headers: {headers}}}"
    found = _smoked(_recipe(tmp_path, model, "{scheme: nvfp4a16}", "evaluate: null"), tmp_path / "o" / "out")
    assert found.layers.kept == 6  # five of sliding attention to one of full attention
    assert found.report.quality is not None


def test_a_local_folder(tmp_path: Path) -> None:
    """With its own tokenizer; layers that the recipe treats otherwise are kept; a gate fails nothing."""
    model = tiny_llama(tmp_path / "model", layers=5, shards=2)
    weights = (
        "{scheme: {kind: int4, group_size: 64}, ignore: ['*.layers.0.*', '*.layers.4.mlp.*'],"
        " rules: [{match: ['*.layers.3.mlp.up_proj', '*.layers.3.mlp.gate_proj'], scheme: fp8_dynamic}]}"
    )
    rest = "evaluate: {tokens: 100000, context: 256, gates: [{metric: kl, max_increase: 0}]}"
    recipe = _recipe(tmp_path / "r", f"{{source: {model}}}", weights, rest)
    said = _said(recipe, tmp_path / "o" / "out")
    assert said.exit_code == 0, said.output
    assert "5 of 5 layers" in said.stdout
    assert "gate       kl would fail" in said.stdout
    assert "the source's own" in said.stdout
    assert "not shown" in said.stdout
    assert _left(tmp_path / "o") == set()


def test_a_pattern_of_a_cut_layer(tmp_path: Path) -> None:
    """It is left out, and named; patterns that meet nothing in the source are faults as ever."""
    model = tiny_llama(tmp_path / "model", layers=12)
    weights = "{{scheme: fp8_dynamic, ignore: ['*.layers.{0}.*'], rules: [{{match: '*.layers.10.mlp.*_proj', "
    weights += "scheme: nvfp4a16}}]}}"
    recipe = _recipe(tmp_path / "r", f"{{source: {model}}}", weights.format(11), "evaluate: null")
    found = _smoked(recipe, tmp_path / "o" / "out")
    assert found.unmet == ("*.layers.11.*", "*.layers.10.mlp.*_proj")
    assert found.layers.kept == 2

    recipe = _recipe(tmp_path / "r", f"{{source: {model}}}", weights.format(40), "evaluate: null")
    with pytest.raises(PlanError, match="matches no tensor"):
        _smoked(recipe, tmp_path / "o" / "out")


def test_faults_of_the_real_sizes_are_the_plans(tmp_path: Path) -> None:
    """The small model would do; the real one does not divide."""
    model = tiny_llama(tmp_path / "model", hidden=96, intermediate=160)
    recipe = _recipe(tmp_path / "r", f"{{source: {model}}}", "{scheme: {kind: int4, group_size: 128}}")
    with pytest.raises(PlanError, match="not a multiple of 128"):
        _smoked(recipe, tmp_path / "o" / "out")
    assert _left(tmp_path / "o") == set()


def test_a_source_that_cannot_be_reached(tmp_path: Path) -> None:
    """One message, as without --smoke."""
    recipe = _recipe(tmp_path, f"{{source: {REPO}}}", "{scheme: fp8_dynamic}")
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        _smoked(recipe, tmp_path / "o" / "out")


def test_fresh_does_not_go_with_it(tmp_path: Path) -> None:
    """There is nothing to do anew."""
    said = _said(tmp_path / "none.yaml", tmp_path / "out", "--fresh")
    assert said.exit_code == 2
    assert "--fresh has no effect with --smoke" in said.output


def test_from_the_hub_without_its_weights(tmp_path: Path) -> None:
    """Config, headers and tokenizer are fetched, no shard; experts, vision tower and projector are there."""
    folder = FAMILIES["llama4_with_tower"](tmp_path / "hub")
    shard = folder / "model.safetensors"
    recipe = _recipe(tmp_path / "r", f"{{source: {REPO}}}", "{scheme: nvfp4a16}", "evaluate: null")
    with serve(folder) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1"}
        command = ["run", str(recipe), "--smoke", "-q", "--output", str(tmp_path / "o" / "out")]
        done = subprocess.run(
            [sys.executable, "-m", "compressor", *command], capture_output=True, text=True, env=environment
        )
        served = hub.served
    assert done.returncode == 0, done.stderr
    assert "Llama4ForConditionalGeneration" in done.stdout
    assert "the source's own" in done.stdout
    assert served["model.safetensors"] < shard.stat().st_size
    assert not any("stages" in name or "partial" in name for name in _left(tmp_path / "o"))


def test_long_context_is_measured_shortly(tmp_path: Path) -> None:
    """A document and a number, whatever the recipe asks for: hours of a large model are seconds here."""
    model = tiny_llama(tmp_path / "model")
    documents = tmp_path / "documents.jsonl"
    documents.write_text(json.dumps({"text": "Many words make a long document. " * 40}) + "\n")
    long = (
        f"{{documents: {documents}, count: 1, tokens: 1000, needles: {{lengths: [900], trials: 9}}, "
        "ruler: {tasks: [ruler_fwe]}}"
    )
    rest = f"context: {{method: yarn, target_length: 1024}}\nevaluate: {{long: {long}}}"
    recipe = _recipe(tmp_path / "recipe", f"{{source: {model}}}", "{scheme: int8}", rest)
    found = _smoked(recipe, tmp_path / "out").report.long
    assert found is not None
    assert found.text is not None
    assert (found.text.tokens, len(found.text.documents)) == (512, 1)
    assert [cell.trials for cell in found.needles["result"]] == [1, 1]
    assert found.ruler == {}


@pytest.mark.parametrize("kind", ["eagle3", "draft_model"])
def test_drafts(tmp_path: Path, kind: str) -> None:
    """A head is trained in few steps on what the small model writes; a draft model is left out."""
    source = tiny_llama(tmp_path / "source", layers=4)
    small = tiny_llama(tmp_path / "small", layers=1)
    rest = {
        "eagle3": "drafts: {kind: eagle3, tokens: 2, train: {vocabulary_size: 200}}",
        "draft_model": f"drafts: {{kind: draft_model, model: {small}}}",
    }
    rest = {name: f"{text}\nevaluate: {{tokens: 256, context: 64}}" for name, text in rest.items()}
    recipe = _recipe(tmp_path / "job", f"{{source: {source}}}", "{scheme: nvfp4a16}", rest[kind])
    found = _smoked(recipe, tmp_path / "out")
    drafts = found.report.drafts
    assert (drafts is not None) == (kind == "eagle3")
    if drafts is not None:
        assert drafts.training is not None
        assert (drafts.training.planned_steps, drafts.training.sequence_length) == (4, 64)
    else:
        said = _said(recipe, tmp_path / "out")
        assert said.stdout.rstrip().endswith("the draft, which fits the source only")


def test_prediction_layers_are_drafts(tmp_path: Path) -> None:
    """Those of a small model are trained too, though it has fewer blocks before them."""
    headers = write_headers(tmp_path / "headers", CONFIGS["qwen3_next"](), predicts=True)
    model = f"{{source: {REPO}, headers: {headers}}}"
    rest = "drafts: {kind: native, tokens: 2, train: {}}\nevaluate: null"
    found = _smoked(_recipe(tmp_path, model, "{scheme: nvfp4a16}", rest), tmp_path / "o" / "out")
    assert found.report.drafts is not None
    assert found.report.drafts.training is not None
    assert found.report.drafts.training.planned_steps == 4
