"""A Hub source larger than the disk that a recipe allows: fetched file by file, and let go."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import compressor
from compressor.workspace import file_sha256
from scripts.benchmarks.watch import disk_bytes
from tests.checkpoint.fake_hub import COMMIT, REPO, FakeHub, serve
from tests.tiny import tiny_llama

TEXT = "Five wizards quickly jump over my boxed vintage. " * 40
# Receipts, tokenizers, configs and stage files, which no plan counts, in whole pages.
SMALL_FILES_BYTES = 500_000


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """A model in eight files, cut so that matrices which share a scale lie in two of them."""
    folder = tiny_llama(
        tmp_path_factory.mktemp("hub") / "model", layers=6, hidden=128, intermediate=1024, shards=8
    )
    with serve(folder) as running:
        yield running


def _recipe(source: str, folder: Path) -> str:
    """Walked, and then streamed: the source is read for its blocks, and again for what stays in 16 bit."""
    (folder / "shown.txt").write_text(TEXT)
    shown = f"datasets: [{{path: {json.dumps(str(folder / 'shown.txt'))}}}]"
    return (
        f"model: {{source: {source}}}\nevaluate: null\nexport: {{max_shard_bytes: 300KB}}\n"
        "weights: {scheme: fp8_static, solver: {kind: rtn, search: minmax}}\n"
        f"calibration: {{{shown}, num_samples: 4, sequence_length: 32}}\n"
    )


def _weights(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in (folder / "out").glob("*.safetensors")}


class _Place:
    """A folder with a recipe, in which runs are told of the Hub ``hub``.

    Attributes:
        fetched: shards that were asked for, in order.
        peak_bytes: most bytes that lay there when one was, that one included.
        most_files: most shards that lay there when one was, that one included.
        kill_at: ends the running process when so many were asked for, and a block is finished.
    """

    def __init__(self, hub: FakeHub, folder: Path, max_bytes: str | int) -> None:
        self._hub, self.folder, self._recipe = hub, folder, folder / "recipe.yaml"
        self.fetched: list[str] = []
        self.peak_bytes, self.most_files, self.kill_at = 0, 0, 1000
        folder.mkdir()
        bound = f"workspace: {{max_bytes: {max_bytes}}}\n"
        self._recipe.write_text(bound + _recipe(f"{REPO}, revision: {COMMIT}", folder))

    def compress(self, verb: str, *more: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of a command on the recipe."""
        places = ("--output", self.folder / "out", "--workspace", self.folder / "space")
        environment = {
            **os.environ,
            "HF_ENDPOINT": self._hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(self.folder / "home"),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "compressor", verb, self._recipe, *places, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

        def asked(name: str) -> None:
            if not name.endswith(".safetensors"):
                return
            self.fetched.append(name)
            size = (self._hub.folder / name).stat().st_size
            there = list((self.folder / "space" / "hub").rglob("*.safetensors"))
            self.most_files = max(self.most_files, len(there) + 1)
            self.peak_bytes = max(self.peak_bytes, disk_bytes([self.folder]) + size)
            # One block alone may lie in files that its neighbour needs as well.
            done = list((self.folder / "space").rglob("*.safetensors.json"))
            if len(self.fetched) >= self.kill_at and len(done) >= 2:
                process.send_signal(signal.SIGKILL)

        self._hub.asked = asked
        out, error = process.communicate()
        self.peak_bytes = max(self.peak_bytes, disk_bytes([self.folder]))
        return process.returncode, out, error

    def run(self) -> None:
        """A run that must end well."""
        status, _, error = self.compress("run", "--quiet")
        assert status == 0, error

    def weights(self) -> dict[str, str]:
        """Hashes of the result's files of weights."""
        return _weights(self.folder)

    def predicted(self) -> int:
        """Bytes of disk as the plan states them."""
        status, out, error = self.compress("plan", "--json")
        assert status == 0, error
        return int(json.loads(out)["disk_bytes"])


def test_source_larger_than_the_bound(hub: FakeHub, tmp_path: Path) -> None:
    """The disk stays within bound and prediction, also through a kill; finished blocks are not fetched
    again; the weights are those of a run from a folder.
    """
    whole = _Place(hub, tmp_path / "whole", "1000GB").predicted()
    place = _Place(hub, tmp_path / "place", whole * 2 // 3)
    predicted = place.predicted()
    assert predicted <= whole * 2 // 3
    place.kill_at = 7
    assert place.compress("run", "--quiet")[0] == -signal.SIGKILL
    before, place.fetched, place.kill_at = place.fetched, [], 1000
    place.run()
    # By the walk, and by the stream for what stays in 16 bit; the last norm's by the first pass as well.
    last = max(place.fetched)
    assert all(place.fetched.count(name) <= 2 + (name == last) for name in place.fetched)
    assert any(place.fetched.count(name) == 1 for name in before[1:]), "finished blocks were fetched again"
    # Two neighbouring blocks lie in four files at most.
    assert place.most_files == 4
    assert 0.8 * predicted < place.peak_bytes < 1.2 * predicted + SMALL_FILES_BYTES
    assert list((place.folder / "space" / "hub").rglob("*.safetensors")) == []
    assert place.weights() == _reference(hub.folder, tmp_path / "reference")


def _reference(source: Path, folder: Path) -> dict[str, str]:
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    recipe.write_text(_recipe(str(source), folder))
    compressor.run(recipe, output=folder / "out")
    return _weights(folder)


def test_bound_that_cannot_be_kept(hub: FakeHub, tmp_path: Path) -> None:
    """Refused in the plan, which says what would do; a part of the plan that reads all is named."""
    place = _Place(hub, tmp_path / "place", "3MB")
    status, _, error = place.compress("plan")
    assert status == 2
    told = re.search(
        r"yaml:1:13: workspace.max_bytes: the run needs ([\d.]+) MB of disk, more than 3.0 MB, though of the "
        r"source only what is being read lies there -> set it to (\d+)MB or more",
        " ".join(error.split()),
    )
    assert told, error
    assert float(told[1]) - 0.05 <= int(told[2]) <= float(told[1]) + 1.05
    status, _, error = place.compress("plan", "--set", "evaluate={context: 64, tokens: 256}")
    assert status == 2
    assert "evaluate needs the whole source on the disk" in " ".join(error.split())
    assert place.fetched == []
