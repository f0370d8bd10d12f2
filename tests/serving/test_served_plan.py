"""Which plans the plug-in follows, and what it says of those that it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import CheckpointError, UserError
from compressor.kv.plan import JSON_NAME, KvPlan, LayerPlan
from compressor.serving.served_plan import PLAN_VARIABLE, served_plan
from tests.serving.plans import layer_plan, mixed_plan


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLAN_VARIABLE, raising=False)


def written(plan: KvPlan, folder: Path) -> str:
    """The folder as an engine is told it."""
    folder.mkdir(exist_ok=True)
    plan.write(folder)
    return str(folder)


def test_a_model_of_another(tmp_path: Path) -> None:
    """Folders without a plan and names on the Hub."""
    assert served_plan(str(tmp_path), "auto") is None
    assert served_plan("HuggingFaceTB/SmolLM2-135M", "fp8") is None


def test_the_folders_own_plan(tmp_path: Path) -> None:
    """With fitted tensors and all."""
    plan = mixed_plan(2, 32)
    found = served_plan(written(plan, tmp_path), "auto")
    assert found is not None
    assert {index: layer.slot_bytes for index, layer in found.layers.items()} == {
        index: layer.slot_bytes for index, layer in plan.layers.items()
    }


def test_named_plan_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``COMPRESSOR_KV_PLAN`` comes before the folder; empty, it turns the plug-in off."""
    own = written(mixed_plan(2, 32), tmp_path / "own")
    named = written(KvPlan({0: layer_plan("turboquant_2.5bit", 2, 32)}), tmp_path / "named")
    monkeypatch.setenv(PLAN_VARIABLE, named)
    found = served_plan(own, "auto")
    assert found is not None
    assert list(found.layers) == [0]
    monkeypatch.setenv(PLAN_VARIABLE, "")
    assert served_plan(own, "auto") is None
    monkeypatch.setenv(PLAN_VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(CheckpointError):
        served_plan(own, "auto")


def test_vllms_own_format_is_left_to_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One format of vLLM with layers in 16 bit; two of them need the plug-in."""
    one = {0: LayerPlan("bf16", 2, 32), 1: layer_plan("turboquant_4bit_nc", 2, 32)}
    folder = written(KvPlan(one), tmp_path / "one")
    assert served_plan(folder, "turboquant_4bit_nc") is None
    two = one | {2: layer_plan("turboquant_3bit_nc", 2, 32)}
    assert served_plan(written(KvPlan(two), tmp_path / "two"), "auto") is not None
    monkeypatch.setenv(PLAN_VARIABLE, folder)
    assert served_plan(folder, "auto") is not None


def test_nothing_packed(tmp_path: Path) -> None:
    """A plan of layers in 16 bit asks for nothing."""
    assert served_plan(written(KvPlan({0: LayerPlan("bf16", 2, 32)}), tmp_path), "auto") is None


def test_windows_in_16_bit(tmp_path: Path) -> None:
    """vLLM's slots of a layer are of one size."""
    plan = KvPlan(mixed_plan(2, 32).layers, sink_tokens=4, recent_tokens=64)
    with pytest.raises(UserError, match=r"4 sink and 64 recent tokens") as caught:
        served_plan(written(plan, tmp_path), "auto")
    assert str(tmp_path / JSON_NAME) in str(caught.value)


def test_two_answers(tmp_path: Path) -> None:
    """A plan and a launch flag for the cache."""
    folder = written(mixed_plan(2, 32), tmp_path)
    with pytest.raises(UserError, match="--kv-cache-dtype fp8"):
        served_plan(folder, "fp8")
    assert served_plan(folder, "bfloat16") is not None
