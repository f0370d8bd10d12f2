"""Recipes with a KV cache from end to end: what is written, folded, verified, and found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compressor
from compressor.checkpoint.folded import KvFold
from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.stored import StoredTensors
from compressor.errors import PlanError
from compressor.kv.plan import KvPlan
from compressor.model.load import load_checkpoint_model, load_source_model
from compressor.progress import Silent
from compressor.verify.folded import folded_source
from compressor.verify.models import check_source_values
from compressor.verify.structure import check_structure
from tests.tiny import tiny_llama

from .cases import content, write_recipe

WEIGHTS = "{scheme: {kind: int4, group_size: 32}}"
SHOWN = "num_samples: 4, sequence_length: 64"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, so that both ends leave some between them; head_dim 64."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny_llama(folder, layers=6, hidden=128, intermediate=128, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Calibration texts, and no evaluation."""
    text = tmp_path_factory.mktemp("texts") / "shown.txt"
    text.write_text("Five wizards quickly jump over my boxed vintage. " * 40)
    path = json.dumps(str(text))
    return f"calibration: {{datasets: [{{path: {path}}}], {SHOWN}}}\nevaluate: null\n"


def run(folder: Path, source: Path, kv: str, rest: str, weights: str = WEIGHTS, **how: Any) -> Path:
    """The output folder of a run."""
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder / "recipe.yaml", source, weights, f"{rest}kv_cache: {kv}\n")
    return compressor.run(recipe, output=folder / "out" / "result", **how).output


def statuses(output: Path, source: Path) -> dict[str, str]:
    """What a verification finds without an engine."""
    folded, checks = folded_source(output, FolderSource(source))
    checks = [
        *check_structure(output, Silent()),
        *checks,
        *check_source_values(output, folded, Silent()),
    ]
    return {check.name: f"{check.status} {check.detail}" for check in checks}


@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_static_fp8(dialect: str, tmp_path: Path, source: Path, rest: str) -> None:
    """Scales of every layer in a shard of the index, named as engines look for them; nothing is folded."""
    weights = "{scheme: nvfp4a16}"
    output = run(tmp_path, source, "{format: fp8}", f"{rest}export: {{format: {dialect}}}\n", weights)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    prefix = "" if dialect == "compressed-tensors" else "k_proj."
    if dialect == "compressed-tensors":
        scheme = config["kv_cache_scheme"]
        assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "tensor")
        assert (scheme["dynamic"], scheme["symmetric"]) == (False, True)
    else:
        file = json.loads((output / "hf_quant_config.json").read_text())["quantization"]
        assert file["kv_cache_quant_algo"] == config["kv_cache_quant_algo"] == "FP8"
        assert file["kv_cache_quantized_layers"]["model.layers.3.self_attn"] == {"quant_algo": "FP8"}
    stored = StoredTensors(output)
    key = stored.read(f"model.layers.3.self_attn.{prefix}k_scale")
    assert key.shape == (1,)
    plan = KvPlan.read(output)
    keys = plan.layers[3].keys
    assert keys is not None
    assert float(keys.tensors()["scale"]) == float(key)
    assert not (output / "kv_fold.tensors").exists()
    found = statuses(output, source)
    assert found["kv_cache"].startswith("passed FP8 scales of keys and values in 6")
    assert all(text.startswith("passed") for text in found.values()), found
    load_checkpoint_model(output, torch.float32)


def test_fp8_scales_are_the_largest_magnitudes(tmp_path: Path, source: Path, rest: str) -> None:
    """Over all calibration tokens, by the ordinary forward pass."""
    from safetensors.torch import load_file
    from transformers import DynamicCache

    output = run(tmp_path, source, "{format: fp8}", rest, "{scheme: int8}")
    (tokens,) = (tmp_path / "out").rglob("tokens.safetensors")
    ids_NT = load_file(tokens)["ids"]
    model = load_source_model(FolderSource(source), torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids_NT, past_key_values=cache)
    stored = StoredTensors(output)
    for index, layer in enumerate(cache.layers):
        expected = float(layer.keys.abs().max()) / 448
        # The pass may be in bf16 where the processor is fast at it.
        found = float(stored.read(f"model.layers.{index}.self_attn.k_scale"))
        assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("weights", [WEIGHTS, "{scheme: int8, solver: gptq}"])
def test_folded_results(weights: str, tmp_path: Path, source: Path, rest: str) -> None:
    """Streamed and walked: the middle layers are folded, and values are compared with the folded source."""
    output = run(tmp_path, source, "{format: turboquant_4bit_nc}", rest, weights)
    assert KvFold.read(output).values == (2, 3)
    assert sorted(KvFold.read(output).keys) == [2, 3]
    found = statuses(output, source)
    assert found["fold"].startswith("passed values of 2 layers rotated, keys of 2 scaled")
    assert all(text.startswith("passed") for text in found.values()), found
    unfolded = check_source_values(output, FolderSource(source), Silent())
    assert any(check.status == "failed" for check in unfolded)
    plan = KvPlan.read(output)
    assert [plan.layers[index].format for index in range(6)] == [
        *["bf16"] * 2,
        *["turboquant_4bit_nc"] * 2,
        *["bf16"] * 2,
    ]
    report = json.loads((output / "report.json").read_text())
    assert report["serve"]["command"].endswith(" --kv-cache-dtype turboquant_4bit_nc")
    assert report["kv"]["bytes_per_token"] == 2 * 70 + 4 * 256
    assert "## KV cache" in (output / "README.md").read_text()
    assert '<section id="kv"' in (output / "report.html").read_text()


def test_without_calibration_values_alone_are_folded(tmp_path: Path, source: Path, rest: str) -> None:
    """A rotation needs no data; factors do."""
    output = run(tmp_path, source, "{format: turboquant_3bit_nc, calibrate: false}", rest)
    fold = KvFold.read(output)
    assert fold.values == (2, 3)
    assert fold.keys == {}
    assert "calibrate is false" in (output / "README.md").read_text()


def test_no_fold_where_it_is_switched_off(tmp_path: Path, source: Path, rest: str) -> None:
    """The weights are then those of a recipe without a KV cache, bit for bit."""
    output = run(tmp_path / "off", source, "{format: turboquant_4bit_nc, fold: false}", rest)
    plain = compressor.run(
        write_recipe(tmp_path / "plain.yaml", source, WEIGHTS, "evaluate: null\n"), output=tmp_path / "plain"
    ).output
    assert not (output / "kv_fold.tensors").exists()
    assert (output / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_formats_of_our_own_are_labelled(tmp_path: Path, source: Path, rest: str) -> None:
    """In report, card and launch line."""
    output = run(tmp_path, source, "{format: turboquant_2.5bit}", rest)
    report = json.loads((output / "report.json").read_text())
    assert report["kv"]["servable"] is False
    assert "--kv-cache" not in report["serve"]["command"]
    assert any("not servable by vLLM 0.32" in note for note in report["serve"]["notes"])
    assert "not servable by vLLM 0.32" in (output / "README.md").read_text()


def test_formats_chosen_under_a_budget(tmp_path: Path, source: Path, rest: str) -> None:
    """One format and a skip list for vLLM, within the budget."""
    output = run(tmp_path, source, "{budget: {bytes_per_token: 800}}", rest)
    report = json.loads((output / "report.json").read_text())["kv"]
    assert report["bytes_per_token"] <= 800
    assert len(set(report["formats"]) - {"bf16"}) == 1
    assert report["flags"].startswith("--kv-cache-dtype ")
    assert KvPlan.read(output).token_bytes == report["bytes_per_token"]


class _Stopping(Silent):
    """Interrupts the run when something is done for the second time."""

    def __init__(self, note: str) -> None:
        self._note = note

    def advance(self, amount: int, note: str = "") -> None:
        if note == self._note:
            raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["block 2", "model.safetensors"])
def test_a_stopped_run_ends_bit_identical(moment: str, tmp_path: Path, source: Path, rest: str) -> None:
    """Stopped while it hears, and while it writes folded weights."""
    kv = "{format: turboquant_4bit_nc}"
    expected = content(run(tmp_path / "whole", source, kv, rest))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", source, kv, rest, progress=_Stopping(moment))
    assert content(run(tmp_path / "parts", source, kv, rest)) == expected


def test_a_damaged_fold_is_refused(tmp_path: Path, source: Path, rest: str) -> None:
    """Of a layer that the model has not."""
    output = run(tmp_path, source, "{format: turboquant_4bit_nc, calibrate: false}", rest)
    KvFold((99,)).write(output)
    assert statuses(output, source)["fold"].startswith("failed values of layer 99")


def test_faults_are_found_in_the_plan(tmp_path: Path, source: Path, rest: str) -> None:
    """With their place in the file."""
    with pytest.raises(PlanError, match=r"recipe\.yaml:\d+:\d+: .* below the smallest format"):
        run(tmp_path, source, "{budget: {bits: 1}}", rest)


def test_the_cache_is_measured_as_stored_and_as_vllm_reads_it(
    tmp_path: Path, source: Path, rest: str
) -> None:
    """Against the same result with a 16-bit cache; what is measured of the weights does not hold it."""
    text = tmp_path / "measured.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    measured = f"evaluate: {{text: {json.dumps(str(text))}, tokens: 256, context: 64}}\n"
    rest = rest.replace("evaluate: null\n", measured)
    output = run(tmp_path / "turbo", source, "{format: turboquant_4bit_nc}", rest)
    found = json.loads((output / "report.json").read_text())["kv"]["quality"]
    assert [row["mode"] for row in found] == ["strict", "vllm"]
    assert all(0 < row["kl_mean"] < 0.5 for row in found)
    fp8 = run(tmp_path / "fp8", source, "{format: fp8}", rest)
    plain = run(tmp_path / "bf16", source, "{format: bf16}", rest)
    (row,) = json.loads((fp8 / "report.json").read_text())["kv"]["quality"]
    report = json.loads((plain / "report.json").read_text())
    assert report["kv"]["quality"] == []
    assert row["perplexity"] != row["perplexity_16bit"]
    weights = json.loads((fp8 / "report.json").read_text())["quality"]["perplexity"]
    assert weights == report["quality"]["perplexity"]
