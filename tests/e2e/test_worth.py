"""A run's compounding table: what it counted and measured, and the cache as it was fitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import compressor
from compressor.checkpoint.safetensors_file import read_header
from compressor.kv.plan import KvPlan
from compressor.report.model import Report, load_report
from tests.tiny import tiny_llama

from .cases import write_recipe


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an own cache, an evaluation and speeds."""
    folder = tmp_path_factory.mktemp("worth")
    source = tiny_llama(folder / "model", layers=3, hidden=128, intermediate=128, heads=2, kv_heads=1)
    text = folder / "text.txt"
    text.write_text("Pack my box with five dozen liquor jugs. " * 60)
    path = json.dumps(str(text))
    # Nothing here is about quality: what is measured is shipped, what is shown is not.
    rest = (
        f"calibration: {{datasets: [{{path: {path}}}], num_samples: 2, sequence_length: 32}}\n"
        "evaluate: {tokens: 256, context: 64, "
        "speed: {prompt_tokens: 16, new_tokens: 4, runs: 1}}\n"
        "kv_cache: {format: turboquant_mse_4bit, sink_tokens: 8}\n"
        "serve: {context: 100, concurrency: 3, price_per_hour: 2}\n"
    )
    recipe = write_recipe(folder / "recipe.yaml", source, "{scheme: nvfp4a16}", rest)
    return compressor.run(recipe, output=folder / "out").output


def test_rows_are_those_of_the_files(result: Path) -> None:
    """Bytes of the tensors, of the fitted cache, the change that was measured; speeds of this device."""
    report: Report = load_report(result)
    assert report.compounding is not None
    rows = {row.key: row for row in report.compounding.rows}
    files = [read_header(path) for path in result.glob("*.safetensors")]
    stored = sum(tensor.nbytes for file in files for tensor in file.headers.values())
    weights = rows["weights"].optimized
    assert (weights.value, weights.mark) == (stored, "measured")
    cache = rows["cache"]
    assert cache.optimized.value == KvPlan.read(result).bytes_at(100)
    assert cache.baseline.value == 3 * 2 * 64 * 2 * 112  # whole blocks of 16 tokens in vLLM
    assert report.quality is not None
    assert rows["perplexity"].optimized.value == report.quality.perplexity.increase
    speed = report.quality.speed
    assert speed is not None
    assert rows["measured_speed"].baseline.value == speed.source.tokens_per_s.median
    assert rows["measured_speed"].optimized.mark == "measured"
    assert any("decoded the result's weights" in note for note in report.compounding.notes)
