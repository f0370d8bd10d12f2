"""Disk while a run goes on, where fetched files are removed when they are read no more."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from compressor.checkpoint.base import FetchedFiles, Source
from compressor.dialects import DIALECTS
from compressor.errors import UserError
from compressor.model.families import family_for
from compressor.planner.claims import claim_tensors
from compressor.planner.disk import Step, bounded, peak_bytes
from compressor.planner.layout import group_units, pack_shards
from compressor.planner.places import check_disk
from compressor.planner.predict import predict
from compressor.recipe.model import WeightsSection
from compressor.workspace import Workspace

from .fakes import LLAMA, llama_headers

HOMES = {"a": "one", "b": "two", "c": "two", "d": "three"}
SIZES = {"one": 100, "two": 200, "three": 400}


@pytest.mark.parametrize(
    "steps, peak",
    [
        ([Step({"a"}, 10), Step({"b", "c"}, 10), Step({"d"}, 10)], 400 + 30),
        # a file that is read again later stays
        ([Step({"a"}, 10), Step({"b"}, 10), Step({"d", "a"}, 10)], 500 + 30),
        ([Step({"b"}, 10), Step({"d"}, 10), Step({"c"}, 10)], 600 + 20),
        # what is written counts to the end
        ([Step({"d"}, 0), Step(set(), 1000)], 1000),
        ([], 0),
    ],
)
def test_files_lie_there_from_the_first_read_to_the_last(steps: list[Step], peak: int) -> None:
    """Of every step: the files that it or a later one reads and an earlier one read, and what is written."""
    homes = {name: (file,) for name, file in HOMES.items()}
    assert peak_bytes(steps, FetchedFiles(homes, SIZES, 0)) == peak


@dataclass
class _Fetched:
    homes: dict[str, str] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    held_bytes: int = 0

    def keep_only(self, names: object) -> None:
        """Nothing is there."""


@pytest.mark.parametrize("local", [False, True])
def test_a_bound_between_the_whole_and_a_part(local: bool) -> None:
    """Nothing is removed where all fits; a local source cannot be; below the least the plan is refused."""
    headers = llama_headers(layers=2)
    weights = WeightsSection.model_validate({"scheme": "nvfp4a16"})
    claims = claim_tensors(headers, LLAMA, family_for(LLAMA), weights, DIALECTS["compressed-tensors"])
    units = group_units(claims)
    shards = pack_shards(units, 50_000)
    files = {name: f"file-{number // 5}" for number, name in enumerate(headers)}
    sizes: dict[str, int] = {}
    for name, file in files.items():
        sizes[file] = sizes.get(file, 0) + headers[name].nbytes
    source = cast("Source", object() if local else _Fetched(files, sizes))
    whole = predict(claims, units, LLAMA, 0 if local else sum(sizes.values()))

    def within(most: int | None, needs_whole: str = "") -> tuple[int, bool, list[UserError]]:
        faults: list[UserError] = []
        found, evicts = bounded(
            whole, source, claims, shards, None, needs_whole=needs_whole, max_bytes=most, faults=faults
        )
        return found.disk_bytes, evicts, faults

    assert within(None) == within(whole.disk_bytes) == (whole.disk_bytes, False, [])
    if local:
        (fault,) = within(whole.disk_bytes - 1)[2]
        assert fault.where == "workspace.max_bytes"
        return
    least, evicts, faults = within(whole.disk_bytes - 1)
    assert evicts
    assert faults == []
    assert whole.result_bytes < least < whole.disk_bytes
    assert within(least) == (least, True, [])
    (fault,) = within(least - 1)[2]
    assert "though of the source only what is being read lies there" in fault.what
    (fault,) = within(least, "evaluate")[2]
    assert "evaluate needs the whole source on the disk" in fault.what


def test_what_was_fetched_before_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1000 bytes are needed, 600 of which lie there: 400 more fit into 450, a new run does not."""
    headers = llama_headers(layers=1)
    weights = WeightsSection.model_validate({"scheme": "nvfp4a16"})
    claims = claim_tensors(headers, LLAMA, family_for(LLAMA), weights, DIALECTS["compressed-tensors"])
    needed = replace(predict(claims, group_units(claims), LLAMA, 0), disk_bytes=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=450))

    def faults(held_bytes: int) -> list[UserError]:
        found: list[UserError] = []
        source = cast("Source", _Fetched(held_bytes=held_bytes))
        check_disk(needed, source, tmp_path / "out", Workspace(tmp_path / "w"), frozenset(), found)
        return found

    assert faults(600) == []
    (fault,) = faults(0)
    assert "MB more of disk" in fault.what
