"""scripts/bench.py: its command line, its settings and its table. What it measures is not tested."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.bench import parse, result_name
from scripts.benchmarks.calibrated import Bench, _row
from scripts.benchmarks.ours import recipe_text
from scripts.benchmarks.process import Failed, last_error, measured, spread, tensor_bytes
from scripts.benchmarks.settings import PEERS, SCHEMES, THEIRS, Setting, chosen, our_setting
from scripts.benchmarks.table import render


@pytest.mark.parametrize("words", [["--peers", "llmcompressor,modelopt"], ["calibrated"]])
def test_peers_alone_name_the_calibrated_benchmark(words: list[str]) -> None:
    """The issue's spelling and the long one are the same, with the defaults of the README."""
    options = parse(words)
    assert options.benchmark == "calibrated"
    assert options.peers == (["llmcompressor", "modelopt"] if "--peers" in words else list(PEERS))
    assert (options.scheme, options.samples, options.length, options.rounds) == ("nvfp4a16", 128, 1024, 3)
    assert options.tokens == 16384
    assert result_name(options) == "calibrated-nvfp4a16"


@pytest.mark.parametrize(
    ("words", "named", "tokens"),
    [(["quality"], "quality", 65536), (["stream", "--gigabytes", "20"], "stream-20gb", 65536)],
)
def test_the_older_benchmarks_keep_their_names(words: list[str], named: str, tokens: int) -> None:
    """Result files and token counts stay what the stored results have."""
    options = parse(words)
    assert (result_name(options), options.tokens) == (named, tokens)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a benchmark"),
        (["--peers", "llmcompressor,nobody"], "unknown peer 'nobody'"),
        (["calibrated", "--samples", "0"], "not a positive number"),
        (["calibrated", "--scheme", "int3"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is run."""
    with pytest.raises(SystemExit):
        parse(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_peer_has_a_row_for_every_scheme(scheme: str) -> None:
    """One that cannot hold a scheme says why; none is silently left out."""
    rows = chosen(scheme, ["rtn", "gptq"], list(PEERS), only=None)
    assert {row.peer for row in rows} == {"compressor", *PEERS}
    for settings in (rows, THEIRS[scheme]):
        assert len({row.slug for row in settings}) == len(settings)


def test_only_keeps_ours_and_the_matching_rows_of_the_peers() -> None:
    """Ours stay, for the comparison."""
    rows = chosen("nvfp4", ["gptq"], ["llmcompressor"], only=["AWQ"])
    assert [row.name for row in rows] == ["compressor, gptq", "llmcompressor, AWQ"]


def test_a_solver_of_ours_is_a_name_or_options() -> None:
    """The options are in the row's name."""
    found = our_setting('{"kind": "gptq", "damping": 0.1}')
    assert (found.name, found.options) == ("compressor, gptq damping 0.1", {"kind": "gptq", "damping": 0.1})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_recipe_is_one_that_the_package_reads(scheme: str, tmp_path: Path) -> None:
    """The package's own parser takes it, with the scheme, the tokens and no evaluation."""
    from compressor.recipe.load import load_recipe

    recipe = tmp_path / "bench.yaml"
    recipe.write_text(recipe_text(tmp_path, scheme, {"kind": "gptq"}, 8, 256))
    loaded = load_recipe(str(recipe)).recipe
    assert loaded.calibration is not None
    assert (loaded.calibration.num_samples, loaded.calibration.sequence_length) == (8, 256)
    assert loaded.evaluate is None
    assert yaml.safe_load(recipe.read_text())["weights"]["solver"] == {"kind": "gptq"}


def test_a_failure_is_told_by_the_line_that_names_the_exception() -> None:
    """Progress bars before and after it, and tools without tracebacks."""
    frames = 'Traceback (most recent call last):\n  File "x"\n    f()\n'
    text = f"bar: 0it\r{frames}RuntimeError: no triton\nbar: 1it [x]\n"
    assert last_error(text, 1) == "RuntimeError: no triton"
    assert last_error("INFO loading\nerror: no such file\n\n", 2) == "error: no such file"
    assert last_error("", -9) == "exit status -9"


def test_a_process_is_measured_and_its_failure_raised() -> None:
    """More output than a pipe holds does not stall it; one that takes too long is ended."""
    found = measured([sys.executable, "-c", "print('x' * 100_000)"])
    assert len(found["stdout"]) == 100_001
    assert found["wall_s"] > 0
    # An interpreter takes some megabytes; no upper bound, since a child starts with its parent's peak.
    assert found["peak_rss_bytes"] > 2**20
    with pytest.raises(Failed, match="ValueError: broken"):
        measured([sys.executable, "-c", "raise ValueError('broken')"])
    with pytest.raises(Failed, match="the limit of a run"):
        measured([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.2)


def test_tensor_bytes_leave_headers_out(tmp_path: Path) -> None:
    """Summed over the files."""
    import torch
    from safetensors.torch import save_file

    for number in range(2):
        tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.uint8)}
        save_file(tensors, tmp_path / f"{number}.safetensors", metadata={"format": "pt"})
    assert tensor_bytes(tmp_path) == 2 * (60 + 7)


def row(perplexity: float = 30.0, size: int = 116_500_000, **other: Any) -> dict[str, Any]:
    """A row of a result file."""
    return {
        "quantize_s": spread([50.0, 54.0, 61.0]),
        "cpu_s": spread([100.0]),
        "peak_rss_bytes": 1_800_000_000,
        "peak_device_bytes": 0,
        "bytes": size,
        "perplexity": {"source": 25.94, "result": perplexity, "increase": perplexity / 25.94 - 1},
        "kl": {"mean": 0.1},
        "evaluated_by": "compress eval",
        **other,
    }


def result(**rows: dict[str, Any]) -> dict[str, Any]:
    """A result file with these rows."""
    return {
        "scheme": "nvfp4a16",
        "is_demo_model": True,
        "samples": 128,
        "length": 1024,
        "text": "calibration/heldout.jsonl",
        "tokens": 16384,
        "rounds": 3,
        "machine": {"processor": "x", "cores": 4, "threads": "4", "date": "2026-11-23"},
        "forward": {"seconds": spread([27.0]), "dtype": "float32"},
        "rows": rows,
    }


def test_the_table_divides_by_the_bare_forward_and_says_what_is_unequal() -> None:
    """Every cell of one row, and the notes."""
    text = render(result(ours=row(), theirs=row(32.0, 117_000_000)))
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert cells == ["ours", "54.0 (50.0–61.0)", "2.0", "100", "1.80", "116.5", "30.000", "+15.7%", "0.1000"]
    assert "stored bytes are not equal" in text
    assert "dequantized Q4_1" in text
    assert "stored bytes" not in render(result(ours=row(), theirs=row(32.0)))


def test_the_table_lists_what_could_not_be_run_and_keeps_its_shape() -> None:
    """A peer's error is below the table; the device's column appears where one row has it."""
    text = render(result(ours=row(peak_device_bytes=10**9), theirs={"error": "ValueError: no CPU"}))
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "peak device, GB" in lines[0]
    assert "- theirs: ValueError: no CPU" in lines
    assert "float32" in text


def test_another_model_is_not_said_to_be_requantized() -> None:
    """The note on Q4_1 is the demo model's."""
    assert "Q4_1" not in render(result(ours=row()) | {"is_demo_model": False})


def test_a_row_holds_every_round_and_an_error_holds_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schema of a result file's rows."""
    options = parse(["--peers", "modelopt", "--model", str(tmp_path), "--work", str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    settings = [our_setting("gptq"), Setting("modelopt", "max")]
    bench = Bench(options, settings)
    figures = {"perplexity": {}, "kl": {}, "evaluated_by": "compress eval"}
    monkeypatch.setattr(bench, "evaluate", lambda setting: figures)
    costs = dict.fromkeys(("quantize_s", "save_s", "wall_s", "cpu_s", "peak_rss_bytes", "peak_device_bytes"))
    runs = [{**costs, **dict.fromkeys(costs, number)} for number in (1, 3, 2)]
    made = _row(bench, settings[0], runs)
    assert made["quantize_s"] == {"min": 2, "median": 4, "max": 6, "runs": 3}
    assert made["peak_rss_bytes"] == 3
    assert len(made["rounds"]) == 3
    json.dumps(made)
    bench.errors[settings[1].name] = "AssertionError: amax must be a CUDA tensor"
    assert _row(bench, settings[1], []) == {"error": "AssertionError: amax must be a CUDA tensor"}


def test_a_setting_that_cannot_be_run_says_why(tmp_path: Path) -> None:
    """Known beforehand: no process is started."""
    (tmp_path / "config.json").write_text("{}")
    options = parse(["--peers", "gptqmodel", "--model", str(tmp_path), "--work", str(tmp_path)])
    with pytest.raises(Failed, match="none of its formats is NVFP4"):
        Bench(options, []).once(next(s for s in THEIRS["nvfp4"] if s.peer == "gptqmodel"))
