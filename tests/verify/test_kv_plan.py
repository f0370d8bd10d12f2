"""``verify`` reads the plan of the KV cache and compares it with config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.kv.fp8 import Fp8TokenHeadCodec
from compressor.kv.plan import JSON_NAME, KvPlan, LayerPlan

from .checked import failed, statuses


def _heads(folder: Path) -> tuple[int, int]:
    config = json.loads((folder / "config.json").read_text())
    return config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]


def _planned(dense: Path, tmp_path: Path) -> Path:
    """A model of two layers with a plan for both."""
    folder = Path(shutil.copytree(dense, tmp_path / "model"))
    layer = LayerPlan("fp8_per_token_head", *_heads(folder), Fp8TokenHeadCodec(), Fp8TokenHeadCodec())
    KvPlan({0: layer, 1: layer}).write(folder)
    return folder


def test_a_plan_of_the_model_passes(dense: Path, tmp_path: Path) -> None:
    """And is told of."""
    folder = _planned(dense, tmp_path)
    assert failed(folder) == {}
    assert statuses(folder)["kv_cache"] == "passed"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan["layers"][1].update(layer=7), "layer 7 of it has no full attention"),
        (lambda plan: plan["layers"][0].update(kv_heads=64), "layer 0 of it has 64 x"),
        (lambda plan: plan.update(version=9), "version 9 of the plan is not known"),
        (lambda plan: plan["layers"][0]["keys"].update(kind="os.system"), "unknown codec"),
    ],
    ids=["layer", "heads", "version", "codec"],
)
def test_a_plan_of_something_else_fails(
    change: Callable[[dict[str, Any]], None], words: str, dense: Path, tmp_path: Path
) -> None:
    """Whoever serves the result would follow it."""
    folder = _planned(dense, tmp_path)
    plan = json.loads((folder / JSON_NAME).read_text())
    change(plan)
    (folder / JSON_NAME).write_text(json.dumps(plan))
    assert words in failed(folder)["kv_cache"]
