"""SIGKILL at random moments: the same command again goes on, and the result is bit-identical."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

import compressor
from tests.tiny import tiny_llama

from .cases import content, write_recipe

# Weights, and how often the run is killed: streamed, and walked block by block.
CASES = {"streamed": ("{scheme: nvfp4a16}", 24), "walked": ("{scheme: nvfp4a16, solver: gptq}", 8)}
TEXT = "Five wizards quickly jump over my boxed vintage. " * 40


def _run(recipe: Path, output: Path) -> None:
    compressor.run(recipe, output=output)


@pytest.mark.parametrize("case", CASES)
def test_killed_runs_end_bit_identical(case: str, tmp_path: Path) -> None:
    """Kills spread over reading, hearing, solving, writing, assembling, reloading and exporting."""
    weights, enough = CASES[case]
    source = tmp_path / "source"
    tiny_llama(source, layers=6, hidden=256, intermediate=512, shards=3)
    (tmp_path / "shown.txt").write_text(TEXT)
    shown = json.dumps(str(tmp_path / "shown.txt"))
    calibration = f"calibration: {{datasets: [{{path: {shown}}}], num_samples: 6, sequence_length: 64}}"
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        source,
        weights,
        f"evaluate: null\nexport: {{max_shard_bytes: 200KB}}\n{calibration if case == 'walked' else ''}",
    )
    # Children fork from a server that has the slow imports done, and no threads yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.e2e.preload"])
    reference = context.Process(target=_run, args=(recipe, tmp_path / "reference" / "out"))
    reference.start()
    reference.join()
    assert reference.exitcode == 0
    timed = context.Process(target=_run, args=(recipe, tmp_path / "timed" / "out"))
    started = time.monotonic()
    timed.start()
    timed.join()
    whole_s = time.monotonic() - started
    expected = content(tmp_path / "reference" / "out")
    moments = random.Random(0)
    kills = rounds = 0
    while kills < enough:
        rounds += 1
        output = tmp_path / f"round-{rounds}" / "out"
        while True:
            process = context.Process(target=_run, args=(recipe, output))
            process.start()
            process.join(moments.uniform(0.0, whole_s))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            assert not output.exists() or content(output) == expected, "a half-written output appeared"
        assert content(output) == expected
        leftovers = [path.name for path in output.parent.rglob("*.tmp-*")]
        assert leftovers == [], "temporary files of killed runs were not swept"
