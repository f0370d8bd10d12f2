"""The stream on its own: resume by shard, reading each tensor once, faults in the reader."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint.folder import FolderSource
from compressor.checkpoint.safetensors_writer import shard_names
from compressor.dialects import DIALECTS
from compressor.errors import CheckpointError
from compressor.model.families import family_for
from compressor.planner.claims import claim_tensors
from compressor.planner.layout import group_units, pack_shards
from compressor.progress import Silent
from compressor.recipe.model import WeightsSection
from compressor.solvers.base import Solved
from compressor.solvers.rtn import Rtn
from compressor.stages.assemble import assemble, check_outputs
from compressor.stages.base import Shard, Unit
from compressor.stages.receipts import all_receipts
from compressor.stages.stream import stream
from compressor.workspace import file_sha256
from tests.tiny import tiny_llama, tiny_llama4

CT = DIALECTS["compressed-tensors"]


class _Counting:
    """A source that counts its reads, and may break at one of them."""

    def __init__(self, source: FolderSource, breaks_at: str = "") -> None:
        self._source = source
        self.breaks_at = breaks_at
        self.reads: list[tuple[str, int | None]] = []

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        self.reads.append((name, index))
        if name == self.breaks_at:
            raise CheckpointError("gone", where=name)
        return self._source.read(name, index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def _shards(source: FolderSource, limit: int) -> list[Shard]:
    weights = WeightsSection.model_validate({"scheme": "nvfp4a16"})
    claims = claim_tensors(source.headers, source.config, family_for(source.config), weights, CT)
    return pack_shards(group_units(claims), limit)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """A random Llama."""
    folder = tmp_path_factory.mktemp("stream") / "model"
    tiny_llama(folder, layers=3)
    return FolderSource(folder)


def test_each_tensor_is_read_once(source: FolderSource, tmp_path: Path) -> None:
    """No matrix is read twice (norms also tell channels' importance), and what is written was claimed."""
    shards = _shards(source, 30_000)
    counting = _Counting(source)
    stream(counting, shards, CT, tmp_path, Silent())
    matrices = [name for name, _ in counting.reads if "norm" not in name]
    assert sorted(matrices) == sorted(name for name in source.headers if "norm" not in name)
    assert {name for name, _ in counting.reads} == set(source.headers)
    check_outputs(shards, [tmp_path / name for name in shard_names(len(shards))])


def test_broken_read_leaves_finished_shards(source: FolderSource, tmp_path: Path) -> None:
    """After a fault the next run reads only what is missing and ends with the same bytes."""
    shards = _shards(source, 30_000)
    names = shard_names(len(shards))
    assert len(shards) > 3
    last = shards[-1].units[-1].claims[-1].tensor.name
    with pytest.raises(CheckpointError, match="gone"):
        stream(_Counting(source, breaks_at=last), shards, CT, tmp_path, Silent())
    assert len(all_receipts(tmp_path)) == len(shards) - 1
    assert not (tmp_path / names[-1]).exists()
    counting = _Counting(source)
    assert stream(counting, shards, CT, tmp_path, Silent())
    wanted = {claim.tensor.name for unit in shards[-1].units for claim in unit.claims}
    assert {name for name, _ in counting.reads if "norm" not in name} == {
        name for name in wanted if "norm" not in name
    }
    whole = tmp_path / "whole"
    whole.mkdir()
    stream(source, shards, CT, whole, Silent())
    assert [file_sha256(tmp_path / name) for name in names] == [file_sha256(whole / name) for name in names]


def test_receipts_hold_hash_and_errors(source: FolderSource, tmp_path: Path) -> None:
    """Each receipt names its shard's hash; together they hold one error a matrix."""
    shards = _shards(source, 10**9)
    stream(source, shards, CT, tmp_path, Silent())
    (receipt,) = all_receipts(tmp_path)
    assert receipt["sha256"] == file_sha256(tmp_path / "model.safetensors")
    assert len(receipt["errors"]) == 3 * 7
    assert all(0 < error["squared_error"] < error["squared_norm"] for error in receipt["errors"])


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    """A fused expert tensor is never read whole: memory stays that of one expert."""
    folder = tmp_path / "llama4"
    tiny_llama4(folder)
    source = FolderSource(folder)
    counting = _Counting(source)
    out = tmp_path / "out"
    out.mkdir()
    stream(counting, _shards(source, 10**9), CT, out, Silent())
    fused = [(name, index) for name, index in counting.reads if ".experts." in name]
    assert fused
    assert all(index is not None for _, index in fused)
    assert len(fused) == len(set(fused))


def test_unclaimed_or_missing_outputs_are_noticed(source: FolderSource, tmp_path: Path) -> None:
    """A shard that lacks a claimed tensor, or holds another, is refused before anything is exported."""
    one = _shards(source, 10**9)
    many = _shards(source, 30_000)
    stream(source, one, CT, tmp_path, Silent())
    with pytest.raises(CheckpointError, match="not as the plan claimed"):
        check_outputs(many[:1], [tmp_path / "model.safetensors"])


def test_a_source_tensor_in_no_shard_is_noticed(source: FolderSource, tmp_path: Path) -> None:
    """Even where the shards are as planned: nothing of the source may be lost on the way."""
    shards = _shards(source, 10**9)
    units = tuple(unit for unit in shards[0].units if "lm_head.weight" not in _tensors(unit))
    assert len(units) == len(shards[0].units) - 1
    lacking = [replace(shards[0], units=units)]
    stream(source, lacking, CT, tmp_path, Silent())
    (tmp_path / "out").mkdir()
    with pytest.raises(
        CheckpointError, match=r"1 tensor\(s\) of the source would be missing.*lm_head.weight"
    ):
        assemble(source, lacking, CT, tmp_path, tmp_path / "out")


def _tensors(unit: Unit) -> set[str]:
    return {claim.tensor.name for claim in unit.claims}


def test_importance_is_the_norms_squared_weight(tmp_path: Path) -> None:
    """q/k/v and gate/up see their norm, o and down nothing; a norm with one open channel protects it."""
    folder = tmp_path / "model"
    tiny_llama(folder, layers=1)
    source = FolderSource(folder)
    seen: dict[str, torch.Tensor | None] = {}

    class Watching(Rtn):
        def solve(
            self, weights_OI: Any, scheme: Any, importance_I: torch.Tensor | None = None
        ) -> list[Solved]:
            seen[str(tuple(weights_OI[0].shape)) + str(len(weights_OI))] = importance_I
            return super().solve(weights_OI, scheme, importance_I)

    shards = _shards(source, 10**9)
    watching = [
        Shard(
            tuple(
                Unit(tuple(replace(c, solver=Watching() if c.solver else None) for c in unit.claims))
                for unit in shard.units
            )
        )
        for shard in shards
    ]
    stream(source, watching, CT, tmp_path, Silent())
    given = {key: value for key, value in seen.items() if value is not None}
    assert len(given) == 2
    norms = [
        source.read(f"model.layers.0.{n}.weight").float() ** 2
        for n in ("input_layernorm", "post_attention_layernorm")
    ]
    for value in given.values():
        assert any(torch.equal(value, norm.clamp(min=1e-3 * float(norm.max()))) for norm in norms)


class _Fetched(_Counting):
    """A source of which each tensor has a file of its own; notes what is let go when."""

    def __init__(self, source: FolderSource) -> None:
        super().__init__(source)
        self.homes = {name: name for name in source.headers}
        self.file_bytes = {name: header.nbytes for name, header in source.headers.items()}
        self.held_bytes = 0
        self.kept: list[set[str]] = []
        self.finished: list[int] = []
        self.folder = Path()

    def keep_only(self, names: Set[str]) -> None:
        self.kept.append(set(names))
        self.finished.append(len(all_receipts(self.folder)))


def test_what_is_read_no_more_is_let_go(source: FolderSource, tmp_path: Path) -> None:
    """After each receipt all but what later shards read; never without being asked; also in a rerun."""
    shards = _shards(source, 30_000)
    silent, fetched = _Fetched(source), _Fetched(source)
    (tmp_path / "silent").mkdir()
    stream(silent, shards, CT, tmp_path / "silent", Silent())
    assert silent.kept == []
    fetched.folder = tmp_path
    stream(fetched, shards, CT, tmp_path, Silent(), evict=True)
    assert fetched.kept[0] == set(source.headers)
    assert fetched.kept[-1] == set()
    assert fetched.finished == list(range(len(shards) + 1))
    for number, kept in enumerate(fetched.kept):
        later = [
            claim.tensor.name for shard in shards[number:] for unit in shard.units for claim in unit.claims
        ]
        assert kept >= set(later)
        assert {name for name in kept - set(later) if "norm" not in name} == set()
    again = _Fetched(source)
    (tmp_path / f"{shard_names(len(shards))[1]}.json").unlink()
    again.folder = tmp_path
    stream(again, shards, CT, tmp_path, Silent(), evict=True)
    assert {name for name, _ in again.reads} == again.kept[0]
    assert again.kept[1:] == [set()]
