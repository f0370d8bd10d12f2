"""What drafts add to a plan: keys, memory, disk, time and words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.planner import drafted
from compressor.planner.plan import Plan, make_plan
from compressor.recipe.load import load_recipe
from compressor.stages.adapt_memory import blocks_of
from tests.model.published import PUBLISHED
from tests.tiny import tiny_llama

TRAIN = "sequence_length: 64, batch: 4, tokens: 5120, held_out_rows: 4"
EAGLE = f"{{kind: eagle3, tokens: 2, train: {{{TRAIN}}}}}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks."""
    return tiny_llama(tmp_path_factory.mktemp("source") / "model", layers=3)


def _plan(folder: Path, source: Path, drafts: str, rest: str = "evaluate: null") -> Plan:
    path = folder / "recipe.yaml"
    path.write_text(f"model: {{source: {source}}}\nweights: {{scheme: nvfp4a16}}\ndrafts: {drafts}\n{rest}\n")
    return make_plan(load_recipe(str(path), ()), output=folder / "out")


def test_the_key_is_of_all_that_changes_the_head(tmp_path: Path, source: Path) -> None:
    """What is only kept on the disk does not, nor where the result goes."""
    drafts = _plan(tmp_path, source, EAGLE).drafts
    assert drafts is not None
    key = drafts.key("a")
    measured = [EAGLE.replace("tokens: 2", f"tokens: 2, measure: {{runs: {runs}}}") for runs in (1, 2)]
    same = [EAGLE.replace("batch: 4", "batch: 4, cache: 1GB"), *measured]
    others = [
        EAGLE.replace("tokens: 2", "tokens: 3"),
        EAGLE.replace("batch: 4", "batch: 4, temperature: 0.7"),
        EAGLE.replace("batch: 4", "batch: 4, learning_rate: 0.01"),
        EAGLE.replace("batch: 4", "batch: 4, vocabulary_size: 64"),
        EAGLE.replace("batch: 4", "batch: 4, save_every: 7"),
    ]
    plans = [_plan(tmp_path, source, text).drafts for text in (*same, *others)]
    keys = [planned.key("a") for planned in plans if planned is not None]
    assert keys[: len(same)] == [key] * len(same)
    assert len({key, *keys[len(same) :]}) == len(others) + 1
    assert drafts.key("b") != key
    asked = {planned.measured_key(key) for planned in plans[1 : len(same)] if planned is not None}
    assert len(asked) == len(measured)


def test_only_one_block_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the language model's config is a part of another."""
    asked = []

    def heard(config: dict[str, Any], *_: object, **__: object) -> int:
        asked.append(blocks_of(config))
        return 1

    monkeypatch.setattr(drafted, "kept_bytes", heard)
    nested = PUBLISHED["qwen3_5_moe"](tmp_path / "nested")
    _plan(tmp_path, nested, f"{{kind: native, train: {{{TRAIN}}}}}")
    assert asked == [1]


def test_measuring_takes_time(tmp_path: Path, source: Path) -> None:
    """In proportion to what is decoded: once and against the clock."""
    times = []
    for more in ("", ", measure: {runs: 1}", ", measure: {runs: 3}", ", measure: {runs: 3, batches: [1, 8]}"):
        planned = _plan(tmp_path, source, EAGLE.replace("tokens: 2", f"tokens: 2{more}")).drafts
        assert planned is not None
        times.append(planned.time_s)
    once, thrice, both = (time - times[0] for time in times[1:])
    assert 0 < once == pytest.approx(thrice / 2)
    assert both == pytest.approx(thrice * 9 / 8)


def test_what_it_costs(tmp_path: Path, source: Path) -> None:
    """Disk for what is kept, more time for more steps; all of it in the plan's figures, and JSON-able."""
    plain = _plan(tmp_path, source, EAGLE)
    kept = _plan(tmp_path, source, EAGLE.replace("batch: 4", "batch: 4, cache: 200KB"))
    longer = _plan(tmp_path, source, EAGLE.replace("5120", "512000"))
    assert plain.drafts is not None
    assert kept.drafts is not None
    assert longer.drafts is not None
    # Four layers' states of 64 tokens, 64 wide, in fp32: three rows fit.
    assert kept.drafts.stage_bytes - plain.drafts.stage_bytes == 3 * 4 * 64 * 64 * 4
    assert kept.prediction.disk_bytes - plain.prediction.disk_bytes == 3 * 4 * 64 * 64 * 4
    assert longer.drafts.time_s > 10 * plain.drafts.time_s
    assert longer.prediction.time_s > plain.prediction.time_s
    told = json.loads(json.dumps(plain.drafts.to_json()))
    assert told["parameters"] == plain.drafts.parameters
    lines = plain.drafts.described()
    assert "EAGLE-3" in lines[0]
    assert "20 steps of 4 x 64 tokens" in " ".join(lines)


def test_rows(tmp_path: Path, source: Path) -> None:
    """As many as are wanted, may be written, and are there."""
    few = _plan(tmp_path, source, EAGLE.replace("batch: 4", "batch: 4, max_generated_tokens: 320")).drafts
    greedy = _plan(
        tmp_path, source, EAGLE.replace("5120", "51200000").replace("4, t", "4, temperature: 0, t")
    )
    assert few is not None
    assert few.spec.rows is not None
    assert (few.spec.rows.rows, few.spec.rows.new_tokens, few.spec.rows.length) == (10, 32, 64)
    assert few.spec.rows.calibration.sequence_length == 32
    assert all(
        dataset.held_out_every for dataset in few.spec.rows.calibration.datasets if "chat" in dataset.name
    )
    assert greedy.drafts is not None
    rows = greedy.drafts.spec.rows
    assert rows is not None
    # The same is never written twice after the same.
    assert rows.rows == rows.calibration.num_samples - rows.held_out


def test_many_texts_at_once_where_caches_fit(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator; a CPU takes a few."""
    here = _plan(tmp_path, source, EAGLE).drafts
    for module in ("draft_spec", "drafted"):
        monkeypatch.setattr(f"compressor.planner.{module}.planned_device", lambda: "cuda")
        monkeypatch.setattr(f"compressor.planner.{module}.available_device_bytes", lambda: 80_000_000_000)
    there = _plan(tmp_path, source, EAGLE).drafts
    assert here is not None
    assert there is not None
    assert here.spec.rows is not None
    assert there.spec.rows is not None
    assert (here.spec.rows.at_once, there.spec.rows.at_once) == (16, 1024)
    assert there.spec.train is not None
    assert there.spec.train.dtype == "bfloat16"
    assert here.key("a") != there.key("a")


def test_texts_are_no_calibration_without_effect(tmp_path: Path, source: Path) -> None:
    """A head needs them, though no scheme does."""
    texts = "calibration: {num_samples: 8}\nevaluate: null"
    assert not any("no effect" in warning for warning in _plan(tmp_path, source, EAGLE, texts).warnings)
