"""Ctrl-C and SIGTERM: exit 130, one line that says how to go on, and a workspace that does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compressor
from tests.tiny import tiny_llama

from .cases import content, write_recipe


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupted_run_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    """The interrupted command says that work is kept; given again it ends as if it had never stopped."""
    source = tmp_path / "source"
    tiny_llama(source, layers=8, hidden=256, intermediate=512, shards=2)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        source,
        "{scheme: nvfp4a16}",
        "evaluate: null\nexport: {max_shard_bytes: 100KB}",
    )
    output = tmp_path / "out" / "result"
    process = subprocess.Popen(
        [sys.executable, "-m", "compressor", "run", str(recipe), "--output", str(output)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A test run in the background ignores SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _wait_for_a_shard(output.parent / ".compress-workspace", process)
    process.send_signal(number)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run the same command again to go on" in said
    assert "Traceback" not in said
    assert printed == ""
    assert not output.exists()
    result = compressor.run(recipe, output=output)
    assert next(stage for stage in result.report.stages if stage.name == "stream").resumed
    whole = compressor.run(recipe, output=tmp_path / "other" / "result")
    assert content(result.output) == content(whole.output)


def _wait_for_a_shard(workspace: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not list(workspace.glob("partial/stream-*/*.safetensors.json")):
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)
