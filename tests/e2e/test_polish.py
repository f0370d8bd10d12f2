"""Polished recipes from end to end: the result, its report, resume, and the faults found before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import compressor
from compressor.errors import PlanError
from compressor.progress import Silent
from compressor.recipe.faults import RecipeFaults
from compressor.recipe.load import dump_recipe, load_recipe
from tests.tiny import tiny_llama

from .cases import content, write_recipe

POLISH = "polish: {steps: 16, learning_rate: 0.004, tokens: 512}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    return tiny_llama(tmp_path_factory.mktemp("source") / "model", layers=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two texts apart, as JSON strings for YAML."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "shown.txt").write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    (folder / "measured.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return {name: json.dumps(str(folder / f"{name}.txt")) for name in ("shown", "measured")}


def _rest(texts: dict[str, str], *, measured: bool = True, rows: int = 16) -> str:
    evaluate = f"{{text: {texts['measured']}, tokens: 256, context: 64}}" if measured else "null"
    shown = f"[{{path: {texts['shown']}}}], num_samples: {rows}, sequence_length: 64"
    return f"calibration: {{datasets: {shown}}}\nevaluate: {evaluate}\n"


class _Interrupting(Silent):
    """Stops the run after some steps of the polish."""

    def __init__(self) -> None:
        self._polishing, self._left = False, 3

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self._polishing = stage == "polish"

    def advance(self, amount: int, note: str = "") -> None:
        self._left -= self._polishing
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "weights",
    [
        "{scheme: nvfp4a16, %s}",
        "{scheme: nvfp4, %s}",
        "{scheme: {kind: int4, group_size: 32}, rules: [{match: '*.down_proj', scheme: mxfp4}], %s}",
    ],
)
def test_polished_result(tmp_path: Path, source: Path, texts: dict[str, str], weights: str) -> None:
    """Differs from the unpolished one in scales and norms only, loads, and the report says what was done."""
    polished = write_recipe(tmp_path / "polished.yaml", source, weights % POLISH, _rest(texts))
    result = compressor.run(polished, output=tmp_path / "out" / "polished")
    report = json.loads((result.output / "report.json").read_text())
    assert [s["name"] for s in report["stages"]] == ["walk", "polish", "stream", "assemble", "evaluate"]
    facts = report["calibration"]["polish"]
    assert facts["steps"] == 16
    assert facts["held_out_tokens"] == 2 * 64
    assert facts["kept"]
    assert facts["kl_after"] < facts["kl_before"]
    assert "Polish: 16 steps" in (result.output / "README.md").read_text()
    plain = compressor.run(polished, overrides=["weights.polish=null"], output=tmp_path / "out" / "plain")
    stored, before = (load_file(run.output / "model.safetensors") for run in (result, plain))
    assert stored.keys() == before.keys()
    names = {name for name in stored if stored[name].tolist() != before[name].tolist()}
    assert {name.rpartition(".")[2] for name in names} <= {"weight_scale", "weight"}
    assert all("norm" in name for name in names if name.endswith(".weight"))
    assert sorted(name for name in names if name.endswith(".weight")) == facts["changed_16bit"] != []
    again = yaml.safe_load((result.output / "recipe.yaml").read_text())["weights"]["polish"]
    assert again == {"steps": 16, "learning_rate": 0.004, "tokens": 512}


def test_walk_is_shared_and_resumed(
    tmp_path: Path, source: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted polish goes on; the walk before it is taken as it is; the bytes are the same."""
    monkeypatch.setattr("compressor.stages.polish._SAVE_S", 0.0)
    monkeypatch.setattr("compressor.stages.polish._WORTH", 0.0)
    rest = _rest(texts, measured=False)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", source, f"{{scheme: nvfp4a16, solver: gptq, {POLISH}}}", rest
    )
    whole = compressor.run(recipe, output=tmp_path / "whole" / "out")
    output = tmp_path / "part" / "out"
    with pytest.raises(KeyboardInterrupt):
        compressor.run(recipe, output=output, progress=_Interrupting())
    part = compressor.run(recipe, output=output)
    assert [stage.resumed for stage in part.report.stages[:2]] == [True, True]
    stored = [(run.output / "model.safetensors").read_bytes() for run in (whole, part)]
    assert stored[0] == stored[1]
    assert content(whole.output) == content(part.output)


def test_left_out_it_is_not_written(tmp_path: Path, source: Path) -> None:
    """Recipes without the section stay the bytes that they were before it existed."""
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16}")
    assert "polish" not in dump_recipe(load_recipe(recipe).recipe)


def test_defaults(tmp_path: Path, source: Path, texts: dict[str, str]) -> None:
    """An empty section is enough; the seed is the recipe's."""
    rest = _rest(texts, measured=False) + "seed: 5\n"
    recipe = write_recipe(tmp_path / "recipe.yaml", source, "{scheme: nvfp4a16, polish: {}}", rest)
    plan = compressor.plan(recipe, output=tmp_path / "out")
    assert plan.walk is not None
    assert plan.polish is not None
    spec = plan.polish.spec
    assert (spec.steps, spec.learning_rate, spec.tokens, spec.seed) == (300, 0.003, 8192, 5)
    assert not any("calibration" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("weights", "rows", "said"),
    [
        ("{scheme: nvfp4a16, polish: {tokens: 32}}", 8, "no whole sequence of 64"),
        ("{scheme: nvfp4a16, polish: {}}", 1, "held out"),
        (
            "{scheme: int8, rules: [{match: lm_head.weight, scheme: int8}, "
            "{match: '*.layers.*_proj.weight', scheme: copy}], polish: {}}",
            8,
            "nothing to polish",
        ),
        ("{scheme: nvfp4a16, polish: {learning_rate: 0}}", 8, "learning_rate"),
        ("{scheme: nvfp4a16, polish: {epochs: 3}}", 8, "epochs"),
    ],
)
def test_faults(
    tmp_path: Path, source: Path, texts: dict[str, str], weights: str, rows: int, said: str
) -> None:
    """What could not work is refused by the plan."""
    recipe = write_recipe(tmp_path / "recipe.yaml", source, weights, _rest(texts, rows=rows))
    with pytest.raises((PlanError, RecipeFaults), match=said):
        compressor.plan(recipe, output=tmp_path / "out")


class _Warned(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_what_is_left_out_of_the_texts_is_told_once(tmp_path: Path, source: Path) -> None:
    """Walk and polish read the same tokens; the walk tells."""
    call = {"messages": [{"role": "assistant", "content": None}]}
    lines = [call, *[{"text": "Five wizards quickly jump over my boxed vintage. " * 20}] * 2]
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = "{path: " + json.dumps(str(tmp_path / "shown.jsonl")) + "}"
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        source,
        "{scheme: int8, polish: {steps: 1, tokens: 64}}",
        f"calibration: {{datasets: [{shown}], num_samples: 4, sequence_length: 64}}\nevaluate: null",
    )
    heard = _Warned()
    compressor.run(recipe, output=tmp_path / "out", progress=heard)
    assert sum("left out" in text for text in heard.warnings) == 1
