"""SIGKILL at random moments: the same command again goes on, and the result is bit-identical."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import compressor
from tests.tiny import tiny_llama

from .cases import content, write_recipe

KILLS = 24


def _run(recipe: Path, output: Path) -> None:
    compressor.run(recipe, output=output)


def test_killed_runs_end_bit_identical(tmp_path: Path) -> None:
    """At least 24 kills, spread over reading, solving, writing, assembling, reloading and exporting."""
    source = tmp_path / "source"
    tiny_llama(source, layers=6, hidden=256, intermediate=512, shards=3)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        source,
        "{scheme: nvfp4a16}",
        "evaluate: null\nexport: {max_shard_bytes: 200KB}",
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
    while kills < KILLS:
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
