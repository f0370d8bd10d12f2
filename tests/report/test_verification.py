"""What the views say of a verification."""

from __future__ import annotations

import io

import pytest

from compressor.report import rows
from compressor.report.html import render_html
from compressor.report.model import Report
from compressor.report.terminal import print_verification, report_console
from compressor.report.verification import EngineFacts, Verification, VerifyCheck
from tests.report.sample import sample_report, sample_verification


def changed(passed: bool, **engine: object) -> Verification:
    """The sample, with other facts of its engine."""
    found = sample_verification()
    assert found.engine is not None
    return found.model_copy(update={"passed": passed, "engine": found.engine.model_copy(update=engine)})


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (sample_verification(), "passed: vllm 0.32.0 loads it and agrees"),
        (changed(False, verdict="disagrees"), "FAILED: vllm 0.32.0: disagrees"),
        (
            changed(True, verdict="unsupported"),
            "passed, but not proven by the engine: vllm 0.32.0: unsupported",
        ),
        (changed(False, verdict="undecided"), "FAILED: vllm 0.32.0: undecided"),
        (sample_verification().model_copy(update={"engine": None}), "passed, without an engine"),
        (
            Verification(
                created="2026-01-02T04:05:06Z",
                passed=False,
                checks=(VerifyCheck(name="tensors", status="failed", detail="x is missing"),),
                engine=None,
            ),
            "FAILED: tensors",
        ),
    ],
)
def test_the_verdict_in_a_sentence(found: Verification, said: str) -> None:
    """A failed check comes before the engine; what is not proven is not called proven."""
    assert rows.verdict(found) == said


def test_plugins_are_shown() -> None:
    """An engine whose kernels a plug-in may have replaced is not taken for the plain one."""
    engine = changed(True, plugins=("emulation",)).engine
    assert isinstance(engine, EngineFacts)
    assert ("program", "vllm 0.32.0 on cpu, float32, with plug-ins emulation") in rows.engine_rows(engine)


def test_a_report_without_verification_says_so() -> None:
    """Older reports load, and no view claims anything."""
    report = sample_report().model_copy(update={"verification": None})
    without = report.to_json().replace(',\n  "verification": null', "")
    assert Report.from_json(without) == report
    assert "not verified yet" in render_html(report)


def test_the_terminal_ends_with_the_verdict() -> None:
    """So that it is what remains on the screen."""
    file = io.StringIO()
    print_verification(sample_verification(), report_console(file, 80))
    assert file.getvalue().rstrip().splitlines()[-1] == "passed: vllm 0.32.0 loads it and agrees"
