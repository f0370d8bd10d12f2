"""A branch that has moved on the Hub is another source, or another text: no stage of before is reused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoint.fake_hub import COMMIT, REPO, serve
from tests.checkpoint.test_hub import call
from tests.tiny import tiny_llama

MOVED = "f" * 40
CODE = (
    "from compressor.planner.plan import make_plan; from compressor.planner.calibrated import walk_key; "
    "from compressor.recipe.load import load_recipe; "
    "plan = make_plan(load_recipe({recipe!r}), planning={planning}); "
    "print(json.dumps([walk_key(plan.walk, plan.claims, plan.source.fingerprint), plan.warnings, "
    "[d.revision for d in plan.calibration.datasets]]))"
)


def _planned(url: str, recipe: Path, planning: bool = True) -> str:
    return call(url, recipe.parent / "cache", CODE.format(recipe=str(recipe), planning=planning))


def _recipe(folder: Path, source: str, dataset: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{{source}}}\nweights: {{scheme: nvfp4a16, solver: gptq}}\nevaluate: null\n"
        f"calibration: {{datasets: [{{{dataset}}}], num_samples: 2, sequence_length: 8}}\n"
    )
    return path


@pytest.mark.parametrize("moving", ["source", "dataset"])
def test_a_moved_branch_is_another_walk(tmp_path: Path, moving: str) -> None:
    """The key holds the commit that the branch is at, and the plan says which that is."""
    model = tiny_llama(tmp_path / "model")
    text = tmp_path / "shown.txt"
    text.write_text("a b c " * 100)
    if moving == "source":
        recipe = _recipe(tmp_path, f"source: {REPO}, revision: main", f"path: {json.dumps(str(text))}")
    else:
        recipe = _recipe(tmp_path, f"source: {json.dumps(str(model))}", f"hub: {REPO}, revision: main")
    with serve(model) as hub:
        before, again = (json.loads(_planned(hub.url, recipe)) for _ in range(2))
        hub.commit = MOVED
        after = json.loads(_planned(hub.url, recipe))
    assert before == again
    assert before[0] != after[0]
    assert any(COMMIT in warning for warning in before[1])
    assert any(MOVED in warning for warning in after[1])
    assert (before[2], after[2]) == (([None], [None]) if moving == "source" else ([COMMIT], [MOVED]))


def test_without_a_hub_a_plan_warns_and_a_run_stops(tmp_path: Path) -> None:
    """With what to do; a pinned dataset needs no answer."""
    model = tiny_llama(tmp_path / "model")
    source = f"source: {json.dumps(str(model))}"
    recipe = _recipe(tmp_path, source, f"hub: {REPO}, revision: main")
    with serve(model) as hub:
        hub.fault = "absent"
        warnings = json.loads(_planned(hub.url, recipe))[1]
        said = _planned(hub.url, recipe, planning=False)
        pinned = _recipe(tmp_path, source, f"hub: {REPO}, revision: {MOVED}")
        assert json.loads(_planned(hub.url, pinned, planning=False))[2] == [MOVED]
    assert any("main may change" in warning for warning in warnings)
    assert "PlanError" in said
    assert "recipe.yaml:4" in said
    assert "pin `revision` to a commit" in said
