"""The report's JSON: contract keys, strictness, exact round trip."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import CheckpointError
from compressor.report.measured import Gate, TaskMetric
from compressor.report.model import Kept, Report, load_report, utc_now
from tests.report.sample import hostile_report, sample_report

TEXT = st.text(max_size=12)
FLOATS = st.floats()
COUNTS = st.integers(0, 2**70)


def test_json_has_every_contract_key() -> None:
    """Scripts rely on these names; ``json`` reads the file, not our model."""
    report = json.loads(sample_report().to_json())
    assert report["schema_version"] == 1
    assert report["source"]["bytes"] == 269_030_016
    assert report["result"]["bytes"] == 116_413_896
    assert report["result"]["bits_per_weight"] == pytest.approx(6.9235, abs=1e-4)
    assert report["result"]["bits_per_target_weight"] == pytest.approx(4.5, abs=1e-3)
    assert report["quality"]["perplexity"] == {
        "source": 22.316,
        "result": 26.806,
        "increase": 0.2012,
        "increase_ci95": [0.181, 0.221],
    }
    assert report["quality"]["kl"]["mean"] == 0.1834
    stage_keys = {"name", "wall_s", "peak_rss_bytes", "peak_device_bytes", "resumed"}
    assert [set(stage) for stage in report["stages"]] == [stage_keys, stage_keys]
    assert report["versions"]["torch"] == "2.13.0"
    assert report["device"] == {"name": "Example CPU", "cores": 2, "memory_bytes": 8_000_000_000}


@pytest.mark.parametrize("report", [sample_report(), sample_report(quality=False), hostile_report()])
def test_round_trip_of_whole_reports(report: Report) -> None:
    """Parsing what was written gives the same report, without quality and with hostile strings too."""
    assert Report.from_json(report.to_json()) == report


@settings(max_examples=60, deadline=None)
@given(
    name=TEXT,
    keys=st.lists(TEXT, min_size=1, max_size=3, unique=True),
    reals=st.lists(FLOATS, min_size=6, max_size=6),
    count=COUNTS,
)
def test_round_trip_of_odd_values(name: str, keys: list[str], reals: list[float], count: int) -> None:
    """Any text, any float (NaN and infinities too) and any count survive bit for bit."""
    sample = sample_report()
    assert sample.quality is not None
    metric = TaskMetric(
        source=reals[0],
        result=reals[1],
        difference=reals[2],
        stderr=reals[3],
        n=count,
        higher_is_better=False,
    )
    report = sample.model_copy(
        update={
            "name": name,
            "quality": sample.quality.model_copy(update={"tasks": {key: {key: metric} for key in keys}}),
            "gates": (Gate(metric=name, max_increase=reals[4], value=reals[5], passed=False),),
            "versions": dict.fromkeys(keys, name),
            "result": sample.result.model_copy(
                update={"left_16bit": (Kept(reason=name, tensors=1, bytes=count),)}
            ),
        }
    )
    text = report.to_json()
    again = Report.from_json(text)
    assert again.to_json() == text
    assert (again.name, list(again.versions), again.gates[0].metric) == (name, keys, name)
    assert again.quality is not None
    figures = again.quality.tasks[keys[0]][keys[0]]
    assert figures.n == count
    limit = again.gates[0].max_increase
    assert limit is not None
    found = (figures.source, figures.result, figures.difference, figures.stderr)
    for before, after in zip(reals, (*found, limit, again.gates[0].value), strict=True):
        assert (math.isnan(before) and math.isnan(after)) or before.hex() == after.hex()
    json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.update(extra=1), "extra"),
        (lambda report: report.pop("device"), "device"),
        (lambda report: report["source"].update(bytes="269"), "source.bytes"),
        (lambda report: report["source"].update(bytes=-1), "source.bytes"),
        (lambda report: report["source"].update(parameters=0), "source.parameters"),
        (lambda report: report["stages"][0].update(resumed=1), "stages.0.resumed"),
        (lambda report: report["quality"]["kl"].update(mean="low"), "quality.kl.mean"),
        (lambda report: report.update(created="yesterday"), "created"),
        (lambda report: report.update(schema_version=2), "another version"),
    ],
)
def test_from_json_is_strict(change: Any, message: str) -> None:
    """A report that differs from the layout is refused with the key's name."""
    report = json.loads(sample_report().to_json())
    change(report)
    with pytest.raises(CheckpointError, match=message) as caught:
        Report.from_json(json.dumps(report), where="here/report.json")
    assert str(caught.value).startswith("here/report.json: ")


def test_faults_do_not_repeat_the_files_content() -> None:
    """Messages go to terminals: values of a stranger's file stay out of them, and so do long lists."""
    report = json.loads(sample_report().to_json())
    report["stages"] = [{"name": "\x1b[31mRED"}] * 50
    with pytest.raises(CheckpointError) as caught:
        Report.from_json(json.dumps(report))
    assert "RED" not in str(caught.value)
    assert "more" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_load_report(tmp_path: Path) -> None:
    """Reads what was written; a missing file, a link, a folder and non-JSON are user faults."""
    path = tmp_path / "report.json"
    with pytest.raises(CheckpointError, match="no report"):
        load_report(tmp_path)
    path.write_text(sample_report().to_json())
    assert load_report(tmp_path) == sample_report()
    path.write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match="not a report"):
        load_report(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="ordinary file"):
        load_report(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="ordinary file"):
        load_report(tmp_path)


def test_load_report_refuses_a_huge_file_unread(tmp_path: Path) -> None:
    """A sparse terabyte is refused by its size."""
    with (tmp_path / "report.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="64 MB"):
        load_report(tmp_path)


def test_now_is_a_valid_time_of_creation() -> None:
    """``utc_now`` gives what ``created`` accepts."""
    report = json.loads(sample_report().to_json())
    report["created"] = utc_now()
    assert Report.from_json(json.dumps(report)).created == report["created"]
