"""Calibrated recipes on the command line: every fault with its place and no traceback; narrow terminals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import compressor
from compressor.cli import progress as shown
from compressor.cli.main import _run
from compressor.cli.plan_view import print_plan
from compressor.cli.progress import Bars, Lines, left_text
from compressor.errors import EXIT_DONE, EXIT_USER
from compressor.report.terminal import print_report, report_console
from tests.report.sample import sample_report
from tests.tiny import tiny_llama

GPTQ = "{scheme: nvfp4a16, solver: gptq}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and texts, good and bad."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama(folder / "model")
    good = json.dumps({"text": "word " * 800}) + "\n"
    files = {
        "good.jsonl": good * 4,
        "broken.jsonl": good + "oops\n",
        "number.jsonl": json.dumps({"text": 3}) + "\n" + good,
        "short.txt": "word " * 30,
        "empty.txt": "",
        "table.json": "[]",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "bytes.txt").write_bytes(b"\xff\xfe" * 400)
    (folder / "calibration").mkdir()
    (folder / "calibration" / "faulty.yaml").write_text("datasets:\n  - {path: good.jsonl, wieght: 2}\n")
    return folder


def _recipe(place: Path, calibration: str, weights: str = GPTQ) -> Path:
    path = place / "recipe.yaml"
    path.write_text(
        f"model: {{source: {json.dumps(str(place / 'model'))}}}\nweights: {weights}\n"
        f"calibration: {calibration}\nevaluate: null\n"
    )
    return path


CASES = [
    ("{mixture: defualt}", GPTQ, "recipe.yaml:3", "no such mixture", "shipped: default"),
    ("{mixture: ../x}", GPTQ, "recipe.yaml:3:24", "letters, digits", ""),
    ("{mixture: faulty}", GPTQ, "faulty.yaml:2", "unknown key", "'weight'"),
    ("{num_samples: 0}", GPTQ, "recipe.yaml:3:28", "greater than or equal to 1, not 0", ""),
    ("{num_samples: many}", GPTQ, "recipe.yaml:3:28", "must be a whole number", ""),
    ("{num_sample: 3}", GPTQ, "recipe.yaml:3", "unknown key", "'num_samples'"),
    ("{sequence_length: 513}", GPTQ, "recipe.yaml:3", "longer than the model's context of 512", "at most"),
    ("{datasets: [{path: gone.txt}]}", GPTQ, "recipe.yaml:3", "no such calibration text", "looked for"),
    ("{datasets: [{path: empty.txt}]}", GPTQ, "recipe.yaml:3", "is empty", "name a text"),
    ("{datasets: [{path: bytes.txt}]}", GPTQ, "recipe.yaml:3", "not UTF-8", "convert it"),
    ("{datasets: [{path: table.json}]}", GPTQ, "recipe.yaml:3", "does not read .json", "export it"),
    ("{datasets: [{path: model}]}", GPTQ, "recipe.yaml:3", "is not a file", "name a text"),
    ("{datasets: [{hub: a/b}]}", GPTQ, "recipe.yaml:3", "needs its `revision`", "pin a commit"),
    ("{datasets: [{path: good.jsonl, weight: 0}]}", GPTQ, "recipe.yaml:3", "greater than 0", ""),
    ("{num_samples: 2}", "{scheme: nvfp4a16, solver: gtpq}", "recipe.yaml:2", "unknown solver", "'gptq'"),
    ("{num_samples: 2}", "{scheme: int8, solver: {kind: gptq, passes: -1}}", "recipe.yaml:2", "passes", "0"),
    ("{num_samples: 2}", "{scheme: int8, solver: gptq+smooth}", "recipe.yaml:2", "joined", "smooth+gptq"),
    ("{num_samples: 1}", "{scheme: int8, polish: {}}", "recipe.yaml:2", "two calibration sequences", "2"),
]


@pytest.mark.parametrize(("calibration", "weights", "where", "what", "fix"), CASES)
def test_faults_of_a_plan(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    calibration: str,
    weights: str,
    where: str,
    what: str,
    fix: str,
) -> None:
    """What, where and what to do, on stderr, once; exit status 2."""
    assert _run(["plan", str(_recipe(place, calibration, weights))]) == EXIT_USER
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("recipe.yaml:3") <= 1
    for part in (where, what, fix):
        assert part in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("file", "where", "what"),
    [
        ("broken.jsonl", "broken.jsonl:2", "write one JSON object a line"),
        ("number.jsonl", "number.jsonl:1", "give it a text"),
        ("short.txt", "recipe.yaml:3", "lower num_samples"),
    ],
)
def test_faults_of_texts_that_a_run_finds(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, where: str, what: str
) -> None:
    """Line by line, before anything is walked."""
    recipe = _recipe(place, f"{{datasets: [{{path: {file}}}], num_samples: 2, sequence_length: 80}}")
    assert _run(["run", str(recipe), "--output", str(tmp_path / "out"), "--quiet"]) == EXIT_USER
    said = capsys.readouterr().err
    assert where in said
    assert what in said
    assert "Traceback" not in said


def test_schemes_of_whole_rows_are_solved_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have no blocks of columns; that is no fault."""
    recipe = _recipe(
        place, "{datasets: [{path: good.jsonl}], num_samples: 2}", "{scheme: fp8_dynamic, solver: gptq}"
    )
    assert _run(["plan", str(recipe)]) == EXIT_DONE
    assert "calibrated on" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_plan_in_a_narrow_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    """Only the line with the output's path is longer; rules, schemes and numbers stay in one piece."""
    monkeypatch.setenv("COLUMNS", str(columns))
    rules = '[{match: "*.down_proj", scheme: fp8_dynamic}]'
    weights = f"{{scheme: nvfp4a16, solver: gptq, rules: {rules}, polish: {{tokens: 1024}}}}"
    recipe = _recipe(place, "{datasets: [{path: good.jsonl}], num_samples: 2, sequence_length: 80}", weights)
    print_plan(compressor.plan(recipe))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("output")) <= columns
    words = " ".join(lines).split()
    for word in ("weights.scheme", "weights.rules.0", "NVFP4A16", "FP8_DYNAMIC", "before", "after"):
        assert word in words
    data = next(number for number, line in enumerate(lines) if line.startswith("data"))
    hanging = lines[data + 1 : lines.index("", data)]
    assert len(hanging) >= 2
    assert all(line.startswith(" " * 8) for line in hanging), "text goes on below itself"


def test_calibration_in_a_narrow_terminal() -> None:
    """Numbers and names of matrices in one piece."""
    file = io.StringIO()
    print_report(sample_report(), report_console(file, 60))
    shown = file.getvalue()
    assert max(map(len, shown.splitlines())) <= max(60, *(len(x) for x in shown.splitlines() if "vllm" in x))
    words = shown.split()
    for word in ("matrices", "change", "model.layers.0.self_attn.o_proj", "-47.5%"):
        assert word in words


@pytest.mark.parametrize("columns", [60, 120])
def test_bars_name_the_block_in_a_narrow_terminal(columns: int) -> None:
    """What is worked on is there in one piece, on one line."""
    file = io.StringIO()
    with Bars(Console(file=file, width=columns, force_terminal=True, color_system=None)) as bars:
        bars.start("walk", 100, "bytes")
        bars.advance(34, "model.layers.26")
        bars._bars.refresh()
    assert any("34%" in line and "model.layers.26" in line for line in file.getvalue().splitlines())


def test_lines_tell_the_time_left_and_no_rate_of_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run had finished counts as done, not as speed: 20 of 80 more in 20 s leave a minute."""
    clock = iter((100.0, 120.0, 120.0))
    monkeypatch.setattr(shown.time, "monotonic", lambda: next(clock))
    file = io.StringIO()
    lines = Lines(file, as_json=False)
    lines.start("walk", 1000, "work", done=200)
    lines.advance(200, "model.layers.3")
    lines.finish()
    assert file.getvalue().splitlines()[1] == "walk: 40% 1:00 left model.layers.3"
    assert left_text(7384.4) == "2:03:04 left"


def test_an_evaluation_text_that_is_too_short(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far too short for any tokenizer: the plan says so. Else the run does; both name the key."""
    recipe = _recipe(place, "{datasets: [{path: good.jsonl}], num_samples: 2}")
    text = f"evaluate={{text: {json.dumps(str(place / 'short.txt'))}, tokens: TOKENS, context: 64}}"
    assert _run(["plan", str(recipe), "--set", text.replace("TOKENS", "301")]) == EXIT_USER
    said = capsys.readouterr().err
    assert "short.txt has 150 bytes; 301 tokens of it are to be read" in said
    assert "lower evaluate.tokens" in said
    fewer = ["--set", text.replace("TOKENS", "300")]
    assert _run(["plan", str(recipe), *fewer]) == EXIT_DONE
    assert _run(["run", str(recipe), *fewer, "--output", str(tmp_path / "out"), "--quiet"]) == EXIT_USER
    said = capsys.readouterr().err
    assert "short.txt: the text has 150 tokens, fewer than the 300 asked for" in said
    assert "--set evaluate" in said
    assert "lower evaluate.tokens" in said


def test_small_caches_in_small_units(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not 0.00 GiB: two layers of two heads of 16, keys and values in 16 bit, 512 tokens."""
    print_plan(compressor.plan(_recipe(place, "{datasets: [{path: good.jsonl}], num_samples: 2}")))
    assert "0.1 MiB at the full context of 512 tokens" in " ".join(capsys.readouterr().out.split())
