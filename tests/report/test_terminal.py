"""The terminal view keeps to its columns, colours only terminals, and obeys no name."""

from __future__ import annotations

import io

import pytest

from compressor.report.model import Report
from compressor.report.terminal import print_report, report_console
from tests.report.sample import hostile_report, sample_report


@pytest.fixture(autouse=True)
def _ordinary_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody forces colour upon files."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def printed(report: Report, width: int = 80) -> str:
    """What a file receives."""
    file = io.StringIO()
    print_report(report, report_console(file, width))
    return file.getvalue()


def test_first_line_answers() -> None:
    """How much smaller, at what loss."""
    first = printed(sample_report(), 120).splitlines()[0]
    assert first == (
        "SmolLM2-135M-Instruct-NVFP4A16: 2.31x smaller (269.0 MB -> 116.4 MB), "
        "perplexity +20.1% (22.32 -> 26.81)"
    )


@pytest.mark.parametrize("width", [60, 61, 80, 117, 200])
@pytest.mark.parametrize("report", [sample_report(), hostile_report()], ids=["sample", "hostile"])
def test_no_line_is_wider_than_the_console(report: Report, width: int) -> None:
    """All but the serve line, which must survive copying."""
    long = [line for line in printed(report, width).splitlines() if len(line.rstrip()) > width]
    assert all("vllm serve" in line or "<script>" in line for line in long)
    assert len(long) <= 1


@pytest.mark.parametrize("width", [60, 80, 200])
def test_nothing_is_cut_off(width: int) -> None:
    """Every figure and name is there in full at any width, once the folds are undone."""
    text = "".join(printed(sample_report(), width).split())
    for expected in (
        "106,168,320",
        "22.316",
        "26.806",
        "0.18340",
        "-0.0196",
        "0.0081",
        "4.50",
        "1.90GB",
        "passed",
    ):
        assert expected in text
    assert "…" not in text


def test_serve_line_is_whole_at_any_width() -> None:
    """A path longer than the console is not folded."""
    path = "/data/" + "deep/" * 30 + "model"
    assert f"vllm serve {path}" in printed(sample_report(path), 60).splitlines()


def test_width_is_kept_between_60_and_200() -> None:
    """Narrower and wider consoles are treated as these."""
    file = io.StringIO()
    assert report_console(file, 20).width == 60
    assert report_console(file, 500).width == 200


@pytest.mark.parametrize("report", [sample_report(), hostile_report()], ids=["sample", "hostile"])
def test_no_control_characters_without_a_terminal(report: Report) -> None:
    """Neither our colours nor a name's escapes; rich's markup in names is text."""
    text = printed(report)
    assert all(char.isprintable() or char == "\n" for char in text)


def test_names_are_shown_not_obeyed() -> None:
    """An escape sequence and rich markup are readable."""
    text = "".join(printed(hostile_report(), 200).split())
    assert "\\x1b[31mred" in text
    assert "[bold]rich[/bold]" in text


def test_units_are_said_once() -> None:
    """One definition of MB for the page."""
    assert printed(sample_report(), 200).count("1 MB = 1,000,000 bytes") == 1


def test_skipped_evaluation_and_failed_gate_are_said() -> None:
    """No table of nothing; a failure stands in the first line."""
    assert "The evaluation was skipped" in printed(sample_report(quality=False), 200)
    assert "1 of 1 gates FAILED" in printed(sample_report(passed=False), 200).splitlines()[0]


def test_stream_that_cannot_encode_names() -> None:
    """An ASCII log file gets escapes and plain rules, no exception."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    report = sample_report().model_copy(update={"name": "模型"})
    print_report(report, report_console(file, 80))
    file.flush()
    assert raw.getvalue().startswith(b"\\u6a21\\u578b: 2.31x smaller")


def test_default_is_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """Results go to stdout, nothing to stderr."""
    print_report(sample_report())
    out, err = capsys.readouterr()
    assert "vllm serve out/smollm2-nvfp4" in out.splitlines()
    assert err == ""
