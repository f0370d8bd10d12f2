"""What the views say of a calibration."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from compressor.report import calibration_rows
from compressor.report.calibration import CalibrationFacts
from compressor.report.card import render_card
from compressor.report.html import render_html
from compressor.report.model import Report
from compressor.report.terminal import print_report, report_console
from compressor.report.words import number
from compressor.schemes import parse_scheme
from compressor.solvers import parse_solver
from compressor.spec import LinearPart, Role, TensorHeader
from compressor.stages.base import Claim
from compressor.stages.receipts import PartError
from compressor.summary import _calibration
from tests.report.sample import RECIPE, hostile_report, sample_calibration, sample_report


def printed(report: Report, width: int) -> str:
    """What a file receives."""
    file = io.StringIO()
    print_report(report, report_console(file, width))
    return file.getvalue()


def changed(**matrix: object) -> CalibrationFacts:
    """The sample with a single matrix, changed so."""
    facts = sample_calibration()
    return facts.model_copy(update={"matrices": (facts.matrices[0].model_copy(update=matrix),)})


def test_caption_says_what_was_shown_and_what_was_not_held_out() -> None:
    """Tokens, sequences, texts, seed, dtype; the source's note; that the errors are of the fitted tokens."""
    caption = calibration_rows.calibration_caption(sample_report())
    assert caption.startswith(
        "131,072 tokens: 128 sequences of 1,024 from prose (98,304), code (32,768); seed 7; "
        "forward passes in float32."
    )
    assert "not on held-out text" in caption
    assert caption.endswith("Source: dequantized from GGUF Q4_1.")


def test_solver_rows_by_hand() -> None:
    """Arithmetic means of what tokens reached, which the count tells; what is kept at rtn is not gptq's."""
    gptq, rtn, total = calibration_rows.solver_rows(sample_calibration())
    before, after = 0.0080 + 0.0060 + 0.0030 + 0.0011 + 0.0019, 0.0040 + 0.0030 + 0.0020 + 0.0010 + 0.0005
    assert gptq == ("NVFP4A16", "gptq", "5", number(before / 5, 5), number(after / 5, 5), "-47.5%")
    assert rtn == ("NVFP4A16", "rtn", "1 of 2", "0.00900", "0.00900", "-")
    # (0.0105 + 0.009) / (0.02 + 0.009) - 1
    assert total == ("all", "", "6 of 7", number(0.029 / 6, 5), number(0.0195 / 6, 5), "-32.8%")


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ((0.004, 0.008), ("0.00800", "0.00400", "-50.0%")),
        ((0.009, 0.008), ("0.00800", "0.00900", "+12.5%")),
        ((0.0, 0.0), ("0.00000", "0.00000", "-")),
        ((0.1, 0.0), ("0.00000", "0.10000", "-")),
        ((None, None), ("-", "-", "-")),
        ((float("nan"), 0.008), ("0.00800", "not a number", "not a number")),
    ],
)
def test_changes_are_signed_and_never_divide_by_zero(
    errors: tuple[float | None, float | None], said: tuple[str, str, str]
) -> None:
    """A worse mean has a plus; no change and no base have a dash; there is no total of a single row."""
    facts = changed(output_error=errors[0], rtn_output_error=errors[1])
    assert calibration_rows.solver_rows(facts) == [("NVFP4A16", "gptq", "1", *said)]


def test_worst_outputs_are_ranked_by_what_is_stored() -> None:
    """Five, largest first; what nothing reached has no error; not-a-number is worse than any number."""
    names = [row[1] for row in calibration_rows.worst_output_rows(sample_calibration())]
    assert [name.removeprefix("model.layers.") for name in names] == [
        "1.mlp.down_proj",
        "0.self_attn.q_proj",
        "0.self_attn.k_proj",
        "0.self_attn.o_proj",
        "1.mlp.gate_proj",
    ]
    facts = sample_calibration()
    broken = facts.matrices[3].model_copy(update={"output_error": float("nan")})
    first = calibration_rows.worst_output_rows(
        facts.model_copy(update={"matrices": (*facts.matrices, broken)})
    )[0]
    assert first == ("NVFP4A16", "model.layers.1.mlp.gate_proj", "0.00110", "not a number")


def test_notes_say_where_calibration_did_nothing() -> None:
    """One matrix kept at rtn by choice, one expert with few tokens, one with none."""
    assert calibration_rows.calibration_notes(sample_calibration()) == [
        "Matrices that keep the values of round to nearest (rtn), since the solver's were no better on these "
        "tokens: 1 of 7: model.layers.1.mlp.down_proj.",
        "Expert matrices that only a part of the tokens reached: 1; the fewest tokens: 413 "
        "(model.layers.2.mlp.experts.0.up_proj).",
        "Expert matrices that no token reached, whose values are not calibrated: "
        "1: model.layers.2.mlp.experts.1.up_proj.",
    ]
    assert calibration_rows.calibration_notes(changed(tokens=131_072)) == []


def test_notes_name_some_of_many() -> None:
    """Three names, and how many more."""
    facts = sample_calibration()
    kept = facts.matrices[4]
    many = tuple(kept.model_copy(update={"name": f"m{index}"}) for index in range(1_203))
    note = calibration_rows.calibration_notes(facts.model_copy(update={"matrices": many}))[0]
    assert note.endswith(": 1,203 of 1,203: m0, m1, m2 and 1,200 more.")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
@pytest.mark.parametrize("report", [sample_report(), hostile_report()], ids=["sample", "hostile"])
def test_terminal_at_any_width(report: Report, width: int) -> None:
    """Narrow consoles are treated as 60 columns; the section comes between Lost and Cost, whole."""
    text = printed(report, width)
    section = text[text.index("\nCalibration") : text.index("\nCost\n")]
    joined = "".join(section.split())
    for expected in ("0.00210", "-47.5%", "-32.8%", "0.00900", "131,072tokens:128sequences", "413"):
        assert expected in joined
    assert all(len(line.rstrip()) <= max(width, 60) for line in section.splitlines())


def test_every_view_shows_the_same() -> None:
    """Figures, worst matrix and notes on the page and in the card."""
    for view in (render_html(sample_report()), render_card(sample_report(), RECIPE).replace("\\_", "_")):
        for expected in (
            "-47.5%",
            "1.mlp.down_proj",
            "keep the values of round to nearest",
            "not on held-out",
        ):
            assert expected in view


def test_a_run_without_calibration_shows_nothing() -> None:
    """Older reports load, and no view has a section on it."""
    report = sample_report().model_copy(update={"calibration": None})
    without = report.to_json().replace(',\n  "calibration": null', "")
    assert "calibration" not in json.loads(without)
    assert Report.from_json(without) == report
    for view in (render_html(report), render_card(report, RECIPE), printed(report, 80)):
        assert "Calibration" not in view
    assert calibration_rows.calibration_caption(report) == ""


def test_nothing_solved_with_data_is_no_table() -> None:
    """Facts without a matrix: only the caption."""
    report = sample_report()
    empty = report.model_copy(
        update={"calibration": sample_calibration().model_copy(update={"matrices": ()})}
    )
    assert "131,072 tokens" in render_html(empty)
    assert "values from" not in render_html(empty) + render_card(empty, RECIPE) + printed(empty, 80)


def _claim(modules: str, solver: str) -> Claim:
    """A tensor that holds a matrix for each letter."""
    parts = tuple(LinearPart(module, 8, 8) for module in modules)
    header = TensorHeader("tensor", "BF16", (len(modules), 8, 8))
    role = Role("linear", parts)
    return Claim(header, role, "quantize", "weights", "", parse_scheme("int8"), parse_solver(solver), ())


def test_facts_from_receipts(tmp_path: Path) -> None:
    """What was solved with data, in the order of the files; what was rounded without is left out."""
    solved = PartError("a", "INT4", 0.1, 1.0, 64, "gptq", output_error=0.2, rtn_output_error=0.3, tokens=16)
    missed = replace(solved, module="b", solver="rtn", output_error=0.0, rtn_output_error=0.0, tokens=0)
    unmeasured = replace(missed, module="c", output_error=None, rtn_output_error=None)
    plain = PartError("d", "INT4", 0.1, 1.0, 64)
    library = replace(plain, module="e", solver="llmcompressor", tokens=16)
    for index, errors in enumerate(([solved, plain, missed], [unmeasured, library])):
        receipt = {"sha256": "", "errors": [asdict(error) for error in errors]}
        (tmp_path / f"model-{index}.safetensors.json").write_text(json.dumps(receipt))
    walked = {"texts": {"prose": 16}, "samples": 2, "sequence_length": 8, "seed": 3, "dtype": "bfloat16"}
    asked = replace(plain, module="f", solver="learned")
    polished = replace(plain, module="g", solver="rtn")
    receipt = {"sha256": "", "errors": [asdict(error) for error in (asked, polished)]}
    (tmp_path / "model-2.safetensors.json").write_text(json.dumps(receipt))
    facts = _calibration(walked, tmp_path, [_claim("abcdef", "learned"), _claim("g", "rtn")])
    assert (facts.tokens, facts.seed, facts.dtype, facts.texts[0].name) == (16, 3, "bfloat16", "prose")
    found = [(m.name, m.solver, m.output_error, m.rtn_output_error, m.tokens) for m in facts.matrices]
    assert found == [
        ("a", "gptq", 0.2, 0.3, 16),
        ("b", "rtn", None, None, 0),
        ("c", "rtn", None, None, 0),
        ("e", "llmcompressor", None, None, 16),
        ("f", "learned", None, None, None),
    ]
    assert CalibrationFacts.model_validate_json(facts.model_dump_json()) == facts
