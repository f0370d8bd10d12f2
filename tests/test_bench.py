"""scripts/bench.py: its command line, its settings and its table. What it measures is not tested."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from compressor.checkpoint.folder import FolderSource
from scripts.bench import parse, result_name
from scripts.benchmarks.budget import render_budget
from scripts.benchmarks.calibrated import Bench, _row
from scripts.benchmarks.kv import render_kv
from scripts.benchmarks.layers import layer_timing, render_layers
from scripts.benchmarks.ours import recipe_text
from scripts.benchmarks.process import (
    Failed,
    is_demo,
    last_error,
    measured,
    shown,
    spread,
    tensor_bytes,
)
from scripts.benchmarks.scout import layers_for, scout_headers, write_random
from scripts.benchmarks.settings import PEERS, SCHEMES, THEIRS, Setting, chosen, our_setting
from scripts.benchmarks.shapes import write_model
from scripts.benchmarks.table import render
from scripts.benchmarks.watch import disk_bytes


@pytest.mark.parametrize("words", [["--peers", "llmcompressor,modelopt"], ["calibrated"]])
def test_peers_alone_name_the_calibrated_benchmark(words: list[str]) -> None:
    """The issue's spelling and the long one are the same, with the defaults of the README."""
    options = parse(words)
    assert options.benchmark == "calibrated"
    assert options.peers == (["llmcompressor", "modelopt"] if "--peers" in words else list(PEERS))
    assert (options.scheme, options.samples, options.length, options.rounds) == ("nvfp4a16", 128, 1024, 3)
    assert options.tokens == 16384
    assert result_name(options) == "calibrated-nvfp4a16"


def test_budget_table() -> None:
    """Correlations only where a predictor has one; signs before losses."""
    row = {"bits_per_target_weight": 4.7461, "kl": 0.1307, "increase": 0.1}
    rows = [{"mix": "gradient x change", "rank_correlation": 0.9804, **row}, {"mix": "random 0", **row}]
    assert render_budget(rows).splitlines()[2:] == [
        "| gradient x change | 0.980 | 4.746 | 0.1307 | +10.00% |",
        "| random 0 | - | 4.746 | 0.1307 | +10.00% |",
    ]
    assert parse(["budget"]).recipe == "recipes/smollm2-auto.yaml"


@pytest.mark.parametrize(
    ("words", "named", "tokens"),
    [
        (["quality"], "quality", 65536),
        (["stream", "--gigabytes", "20"], "stream-20gb", 65536),
        (["walk", "--source", "scout", "--gigabytes", "20"], "walk-scout-20gb", 65536),
    ],
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
    assert yaml.safe_load(recipe.read_text())["weights"]["solver"] == "gptq"


def test_a_failure_is_told_by_the_line_that_names_the_exception() -> None:
    """Progress bars before and after it, and tools without tracebacks."""
    frames = 'Traceback (most recent call last):\n  File "x"\n    f()\n'
    text = f"bar: 0it\r{frames}RuntimeError: no triton\nbar: 1it [x]\n"
    assert last_error(text, 1) == "RuntimeError: no triton"
    assert last_error("INFO loading\nerror: no such file\n\n", 2) == "error: no such file"
    assert last_error("", -9) == "exit status -9"


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("see /runs/out/error-1.log for more", "see error-1.log for more"),
        ("/data/models/tiny", "tiny"),
        ("calibration/heldout.jsonl", "calibration/heldout.jsonl"),
        (
            "https://example.org/a/b.html and/or pkg:x/y.gguf",
            "https://example.org/a/b.html and/or pkg:x/y.gguf",
        ),
    ],
)
def test_result_files_do_not_name_folders_of_a_machine(told: str, kept: str) -> None:
    """Absolute paths lose their folders; relative ones and addresses stay."""
    assert shown(told) == kept


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
    theirs = row(32.0, 117_000_000, activations_simulated=False)
    text = render(result(ours=row(activations_simulated=True), theirs=theirs))
    assert "only the weights are measured: theirs." in text
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


def test_only_may_name_the_end_of_a_row() -> None:
    """``WORD$`` tells a setting from those that add to it."""
    rows = chosen("nvfp4a16", ["gptq"], ["llmcompressor"], only=["GPTQ$"])
    assert [row.name for row in rows] == ["compressor, gptq", "llmcompressor, GPTQ"]
    assert len(chosen("nvfp4a16", ["gptq"], ["llmcompressor"], only=["GPTQ"])) > 2


def test_ours_may_be_polished_and_calibrated_on_other_texts(tmp_path: Path) -> None:
    """The recipe's own sections, as the package's parser reads them."""
    from compressor.recipe.load import load_recipe

    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    recipe = tmp_path / "bench.yaml"
    solver = our_setting('{"kind": "gptq", "polish": {"steps": 5}}').options
    recipe.write_text(recipe_text(tmp_path, "nvfp4a16", solver, 8, 256, [str(text)]))
    loaded = load_recipe(str(recipe)).recipe
    assert loaded.weights.polish is not None
    assert loaded.weights.polish.steps == 5
    assert loaded.calibration is not None
    assert [dataset.path for dataset in loaded.calibration.datasets or ()] == [str(text)]


def test_a_demo_model_is_one_wherever_its_file_lies() -> None:
    """The note on Q4_1 must not be lost with the path."""
    assert is_demo(None)
    assert is_demo("/tmp/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert not is_demo("/tmp/off-grid")


def test_layers_and_off_grid_have_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """GPTQ against llm-compressor; a training text must be named."""
    options = parse(["layers", "--shape", "qwen3-moe"])
    assert (options.ours, options.peers, options.layers) == (["gptq"], ["llmcompressor"], 3)
    assert result_name(options) == "layers-qwen3-moe"
    assert parse(["off-grid", "--train", "a.jsonl"]).steps == 200
    with pytest.raises(SystemExit):
        parse(["off-grid"])
    assert "--train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ends", "seconds", "how"),
    [([5.0, 7.0, 10.0, 12.5], 2.5, "period"), ([5.0], 5.0, "first"), ([], 60.0, "bound")],
)
def test_a_layer_takes_the_time_between_two_ends(ends: list[float], seconds: float, how: str) -> None:
    """The start counts only where there is nothing else."""
    found = layer_timing(ends, elapsed_s=60.0)
    assert (found["layer_s"], found["measured_by"]) == (seconds, how)


def test_the_layers_table_says_bounds_and_ratios() -> None:
    """A peer that was stopped has a lower bound, and no weights that anyone counted."""
    peaks = {"peak_rss_bytes": 10**9, "peak_device_bytes": 2 * 10**9}
    text = render_layers(
        {
            **result(),
            "shape": "llama-8b",
            "layers": 3,
            "forward_s": 0.5,
            "rows": {
                "ours": layer_timing([1.0, 3.0], 9.0) | peaks | {"quantized_weights": 5_000_000},
                "theirs": layer_timing([], 60.0) | peaks,
                "others": {"error": "ValueError: no"},
            },
        }
    )
    lines = text.splitlines()
    assert lines[2] == "| ours | 2.00 | 1.0 | 2.00 | 1.00 | 5.0 |"
    assert lines[3] == "| theirs | > 60.00 | > 30.0 | 2.00 | 1.00 | stopped |"
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "- others: ValueError: no" in lines


def test_a_stopped_worker_has_told_what_it_took(tmp_path: Path) -> None:
    """Its marks and peaks are in the file that it kept up to date."""
    import torch
    from safetensors.torch import save_file

    save_file({"ids": torch.zeros(1, 1, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    facts = {name: str(tmp_path) for name in ("source", "target")} | {"scheme": "x", "options": {}}
    facts |= {"ids": str(tmp_path / "ids.safetensors"), "report": str(tmp_path / "a.report.json")}
    (tmp_path / "job.json").write_text(json.dumps(facts))
    script = (
        "import sys, time; sys.path.insert(0, 'scripts/benchmarks/peers'); from shared import Job\n"
        "job = Job(sys.argv[1])\nwith job.beating():\n    job.mark()\n    time.sleep(1.5)\n    assert False"
    )
    with pytest.raises(Failed):
        measured([sys.executable, "-c", script, tmp_path / "job.json"])
    told = json.loads((tmp_path / "a.report.beat").read_text())
    assert len(told["marks_s"]) == 1
    assert told["elapsed_s"] >= 1.0
    assert told["peak_rss_bytes"] > 2**20


@pytest.mark.parametrize(("shape", "kind"), [("tiny-llama", "llama"), ("tiny-moe", "qwen3_moe")])
def test_a_shape_is_a_model_that_the_package_plans(shape: str, kind: str, tmp_path: Path) -> None:
    """All matrices of its layers are 2-D in the checkpoint, experts too."""
    from safetensors import safe_open

    write_model(shape, 1, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == kind
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    assert sum(".mlp.experts." in name for name in shapes) == (24 if kind == "qwen3_moe" else 0)
    assert all(len(shape) <= 2 for shape in shapes.values())


def q4_1(weight: Any) -> Any:
    """Rounded to Q4_1, block by block: 16 values from the smallest to the largest."""
    import torch

    rows = weight.double().reshape(-1, 32)
    made = []
    for row in rows:
        low, step = row.min(), (row.max() - row.min()) / 15
        made.append(torch.round((row - low) / step) * step + low)
    return torch.stack(made).reshape(weight.shape)


def test_the_distance_to_a_grid_is_none_on_it_and_grows_off_it() -> None:
    """A matrix on its grid costs nothing to store again; one that knows of none lies 1/sqrt(12) off."""
    import torch

    from scripts.benchmarks.tune import grid_distance

    draws = torch.Generator().manual_seed(0)
    old = q4_1(torch.randn(64, 256, generator=draws, dtype=torch.float64))
    still = grid_distance(old, old)
    assert still["changed"] == 0
    # fp64 rounding only.
    assert max(still["steps"], still["again"], still["moved"]) < 1e-20
    # Moved by less than half a step within a grid of 16: the distance is the move.
    moved = grid_distance(old * 1.0 + 0.01, old)
    assert moved["changed"] == old.numel()
    assert moved["moved"] == pytest.approx(old.numel() * 1e-4)
    fresh = grid_distance(old + torch.randn(old.shape, generator=draws, dtype=torch.float64), old)
    inside = (fresh["steps"] / fresh["counted"]) ** 0.5
    # Those that left the block's range add to it.
    assert inside > 12**-0.5
    again = q4_1(old + 0.3)
    assert grid_distance(old + 0.3, old)["again"] == pytest.approx(
        float((again - old - 0.3).square().sum()), abs=1e-20
    )


def test_training_leaves_out_what_calibrates_or_measures(tmp_path: Path) -> None:
    """A document that shares one long line; the order of the rows is the seed's."""
    from scripts.benchmarks.tune import ROW_TOKENS, training_rows

    shared = "x" * 100
    texts = [f"{shared}\nmore", *("word " * ROW_TOKENS for _ in range(2))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": [{"content": f"before\n  {shared}\n"}]}))

    class Words:
        eos_token_id = 0

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [len(word) for word in text.split()]}

    job = {"train": [str(tmp_path / "train.jsonl")], "forbidden": [str(tmp_path / "held.jsonl")]}
    rows, left_out = training_rows(job, Words())
    assert (tuple(rows.shape), left_out) == ((2, ROW_TOKENS), 1)
    assert set(rows.flatten().tolist()) == {0, 4}


def test_a_synthetic_scout_has_its_tensors(tmp_path: Path) -> None:
    """Names and shapes are the published ones, with fewer layers; what is written is a checkpoint."""
    whole, two = scout_headers(48), scout_headers(2)
    assert sum(header.numel for header in whole) == 108_641_793_536
    assert {header.name for header in whole} > {header.name for header in two}
    assert layers_for(40) == 8
    assert sum(header.nbytes for header in scout_headers(8)) > 40e9 > sum(h.nbytes for h in scout_headers(7))
    small = [header for header in two if header.numel < 1e6 and header.name.startswith("language_model.")]
    for folder in ("one", "two"):
        write_random(tmp_path / folder, small, {"model_type": "llama4"})
    one, two_source = FolderSource(tmp_path / "one"), FolderSource(tmp_path / "two")
    assert list(one.headers.values()) != []
    for header in small:
        tensor = one.read(header.name)
        assert tuple(tensor.shape) == header.shape
        assert tensor.isfinite().all()
        assert tensor.equal(two_source.read(header.name))
    routers = [one.read(header.name) for header in small if "router" in header.name]
    assert not routers[0].equal(routers[1])


def test_disk_counts_a_linked_file_once(tmp_path: Path) -> None:
    """As shards that the output shares with the workspace; folders may be missing."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a").write_bytes(b"x" * 8192)
    alone = disk_bytes([tmp_path / "one", tmp_path / "none"])
    assert alone >= 8192
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "b").hardlink_to(tmp_path / "one" / "a")
    assert disk_bytes([tmp_path / "one", tmp_path / "two"]) == alone


def test_what_a_process_holds_is_measured() -> None:
    """Memory of its own, as it was at the most."""
    code = "import time; held = bytearray(300_000_000); time.sleep(0.5); del held; time.sleep(0.2)"
    found = measured([sys.executable, "-c", code])
    assert 300e6 < found["peak_anonymous_bytes"] < 340e6


def test_the_kv_table_has_a_row_for_each_format() -> None:
    """Widest first; needles and generation may be missing."""
    options = parse(["kv", "--formats", "fp8", "bf16", "--needle", "512"])
    assert (options.formats, options.modes, options.needle) == (["fp8", "bf16"], ["strict", "vllm"], [512])
    assert (result_name(options), options.tokens, options.length) == ("kv", 65536, 1024)
    record = {
        "format": "fp8",
        "tier": "vllm",
        "mode": "strict",
        "bits": 8.0,
        "bytes_per_token": 11520.0,
        "peak_bytes": 100,
        "perplexity": {"increase": 0.01, "increase_ci95": [0.005, 0.015]},
        "kl": {"mean": 0.01, "p999": 0.1},
        "top1_agreement": 0.95,
        "generation": {"until_divergence": 11.0, "new_tokens": 128},
        "needle": {"relative_score": None, "logprob_change": -0.25},
    }
    bare = record | {"format": "bf16", "bits": 16.0, "needle": None, "generation": None, "tier": "own"}
    lines = render_kv([record, bare]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| bf16 | own cache | 16.00 | 11,520 | 100 | +1.00% | +0.50% to +1.50% |")
    assert lines[3].endswith("| 95.00% | 11.0 |  | -0.250 |")
