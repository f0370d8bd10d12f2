"""The walk against a slow second implementation; resume inside it; experts; where states are kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.folder import FolderSource
from compressor.dialects import DIALECTS
from compressor.errors import CheckpointError
from compressor.model import paused
from compressor.model.blocks import Block
from compressor.model.tape import Tape
from compressor.planner.layout import group_units, pack_shards
from compressor.progress import Silent
from compressor.stages.base import Claim
from compressor.stages.receipts import all_receipts
from compressor.stages.stream import stream
from compressor.stages.walk import WalkSpec, walk
from compressor.stages.walked import WalkedTensors, layer_name
from compressor.workspace import file_sha256
from tests.tiny import tiny_llama, tiny_llama4

from .walking import SPEC, claims_of, some_tokens, whole_model_walk

GPTQ = {"kind": "gptq"}


class _Warned(Silent):
    """Keeps warnings, and what was solved."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def advance(self, amount: int, note: str = "") -> None:
        self.notes.append(note)


class _Stopping(_Warned):
    """Interrupts the walk when the ``after``-th matrix group is solved."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def advance(self, amount: int, note: str = "") -> None:
        super().advance(amount, note)
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three blocks in fp32."""
    return tiny_llama(tmp_path_factory.mktemp("walk") / "model", layers=3, dtype=torch.float32)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama 4 with experts in both blocks."""
    return tiny_llama4(tmp_path_factory.mktemp("walk-moe") / "model", experts=4)


def _walk(
    folder: Path,
    claims: list[Claim],
    target: Path,
    spec: WalkSpec = SPEC,
    progress: Silent | None = None,
    ids: torch.Tensor | None = None,
) -> bool:
    target.mkdir(exist_ok=True)
    shown = some_tokens(5, 32) if ids is None else ids
    return walk(FolderSource(folder), claims, shown, spec, target, progress or Silent())


def _hashes(target: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(target.glob("layer-*.safetensors"))}


@pytest.mark.parametrize(
    "weights",
    [
        {"scheme": "nvfp4a16", "solver": GPTQ},
        {
            "scheme": {"kind": "int4", "group_size": 32},
            "solver": GPTQ,
            "ignore": ["*.layers.1.self_attn.*"],
            "rules": [{"match": "*.down_proj", "scheme": "fp8_dynamic", "solver": "rtn"}],
        },
        {
            "scheme": "nvfp4",
            "solver": GPTQ,
            "rules": [{"match": "*.o_proj", "scheme": "fp8_static", "solver": GPTQ}],
        },
    ],
    ids=["nvfp4a16", "mixed", "nvfp4"],
)
def test_same_as_two_whole_models(folder: Path, tmp_path: Path, weights: dict[str, object]) -> None:
    """Bit for bit what two whole models with hooks give: replay, pairing, order and feeding are right."""
    source = FolderSource(folder)
    claims = claims_of(source, weights)
    _walk(folder, claims, tmp_path / "walk")
    # batch_tokens 64 of sequences of 32: two, two and one.
    expected = whole_model_walk(folder, source, claims, some_tokens(5, 32).split(2))
    walked = WalkedTensors(tmp_path / "walk")
    for module, tensors in expected.items():
        stored = walked.local(module)
        assert stored.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(stored[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), module
    assert len(expected) == sum(claim.scheme is not None for claim in claims)


def test_ranges_alone_take_one_stream(folder: Path, moe: Path, tmp_path: Path) -> None:
    """Plain rounding with static inputs: the source's stream is all that is heard; experts share a range."""
    for name, model in (("llama", folder), ("llama4", moe)):
        source = FolderSource(model)
        claims = claims_of(source, {"scheme": "nvfp4"})
        _walk(model, claims, tmp_path / name)
        walked = WalkedTensors(tmp_path / name)
        for claim in claims:
            for part in claim.role.parts if claim.scheme else ():
                scale = walked.local(part.module)["input_global_scale"]
                assert bool(scale.isfinite().all())
                assert float(scale) > 0
    down = "model.layers.1.feed_forward.experts.{}.down_proj"
    scales = {float(walked.local(down.format(expert))["input_global_scale"]) for expert in range(4)}
    assert len(scales) == 1


@pytest.mark.parametrize("after", [1, 3, 4, 5, 9, 11])
def test_resumes_at_the_block(folder: Path, tmp_path: Path, after: int) -> None:
    """Interrupted anywhere, the next run solves no finished block again and ends with the same bytes."""
    claims = claims_of(FolderSource(folder), {"scheme": "nvfp4a16", "solver": GPTQ})
    _walk(folder, claims, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _walk(folder, claims, tmp_path / "part", progress=_Stopping(after))
    again = _Warned()
    finished = (after - 1) // 4  # four groups a block; the receipt follows the last
    assert _walk(folder, claims, tmp_path / "part", progress=again) == (finished > 0)
    assert again.notes[0] == f"model.layers.{finished}"
    assert len(again.notes) == 4 * (3 - finished)
    assert _hashes(tmp_path / "part") == _hashes(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == sorted(
        name + suffix for index in range(3) for name in (layer_name(index),) for suffix in ("", ".json")
    ), "states are kept for a rerun only"


def test_resumes_without_kept_states(folder: Path, tmp_path: Path) -> None:
    """Where the states of the interrupted run are gone, finished blocks are passed again."""
    claims = claims_of(FolderSource(folder), {"scheme": "nvfp4a16", "solver": GPTQ})
    _walk(folder, claims, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _walk(folder, claims, tmp_path / "part", progress=_Stopping(9))
    kept = list((tmp_path / "part").glob("kept-*"))
    assert len(kept) == 1
    kept[0].unlink()
    again = _Warned()
    assert _walk(folder, claims, tmp_path / "part", progress=again)
    assert again.notes[0] == "model.layers.2"
    assert _hashes(tmp_path / "part") == _hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    "change", [{"states": "disk"}, {"states": "device"}, {"moment_bytes": 1}, {"keep_inputs": False}]
)
def test_places_change_nothing(moe: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Where states wait, what is kept and how many passes statistics take is no part of the result."""
    claims = claims_of(FolderSource(moe), {"scheme": "nvfp4a16", "solver": GPTQ})
    _walk(moe, claims, tmp_path / "one")
    _walk(moe, claims, tmp_path / "two", replace(SPEC, **change))
    assert _hashes(tmp_path / "one") == _hashes(tmp_path / "two")
    assert all_receipts(tmp_path / "one") == all_receipts(tmp_path / "two")
    assert not list((tmp_path / "two").glob("*tmp*"))


def test_experts_are_heard_apart(moe: Path, tmp_path: Path) -> None:
    """Every expert is solved on its own tokens, which add up to all; of 16 tokens any are topped up."""
    claims = claims_of(FolderSource(moe), {"scheme": "nvfp4a16", "solver": GPTQ})
    _walk(moe, claims, tmp_path / "walk", ids=some_tokens(2, 8))
    errors = [error for receipt in all_receipts(tmp_path / "walk") for error in receipt["errors"]]
    by_module = {error["module"]: error for error in errors}
    assert len(by_module) == len(errors) == sum(len(claim.role.parts) for claim in claims if claim.scheme)
    for layer in range(2):
        heard = [
            by_module[f"model.layers.{layer}.feed_forward.experts.{e}.down_proj"]["tokens"] for e in range(4)
        ]
        assert sum(heard) == 16, "each token goes to one expert"
    for error in errors:
        assert error["output_error"] <= error["rtn_output_error"]
        routed = ".experts." in error["module"]
        enough = max(0, 8 - error["tokens"])  # 64 / 8
        assert error["topped_up"] == (enough if routed else 0)


def test_stream_puts_walked_tensors_in_place(moe: Path, tmp_path: Path) -> None:
    """The shards hold the walk's bytes under the dialect's names, and the rest as without a walk."""
    source = FolderSource(moe)
    claims = claims_of(source, {"scheme": "nvfp4a16", "solver": GPTQ})
    _walk(moe, claims, tmp_path / "walk")
    walked = WalkedTensors(tmp_path / "walk")
    shards = pack_shards(group_units(claims), 1 << 40)
    (tmp_path / "out").mkdir()
    stream(source, shards, DIALECTS["compressed-tensors"], tmp_path / "out", Silent(), walked)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for claim in claims:
        if claim.scheme is None:
            assert torch.equal(stored[claim.tensor.name], source.read(claim.tensor.name))
            continue
        for part in claim.role.parts:
            for local, tensor in walked.local(part.module).items():
                found = stored[f"{part.module}.{local}"]
                assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    (receipt,) = all_receipts(tmp_path / "out")
    assert {error["solver"] for error in receipt["errors"]} <= {"gptq", "rtn"}


def test_not_finite_weight_is_named(tmp_path: Path) -> None:
    """A NaN in a block stops the walk with the matrix's name; finished blocks stay."""
    folder = tiny_llama(tmp_path / "model", layers=2, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    claims = claims_of(FolderSource(folder), {"scheme": "nvfp4a16", "solver": GPTQ})
    with pytest.raises(CheckpointError, match="non-finite") as raised:
        _walk(folder, claims, tmp_path / "walk")
    assert raised.value.where == "model.layers.1.self_attn.o_proj"
    assert list(_hashes(tmp_path / "walk")) == [layer_name(0)]


def test_damaged_block_is_solved_again(folder: Path, tmp_path: Path) -> None:
    """A finished file that has changed does not count as finished; outside of a walk it is refused."""
    claims = claims_of(FolderSource(folder), {"scheme": "nvfp4a16", "solver": GPTQ})
    _walk(folder, claims, tmp_path / "walk")
    expected = _hashes(tmp_path / "walk")
    path = tmp_path / "walk" / layer_name(1)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="has changed"):
        WalkedTensors(tmp_path / "walk")
    again = _Warned()
    assert _walk(folder, claims, tmp_path / "walk", progress=again)
    assert set(again.notes) == {"model.layers.1"}
    assert _hashes(tmp_path / "walk") == expected


def test_why_data_was_not_used_is_said(tmp_path: Path) -> None:
    """Inputs that are all zero teach nothing: the matrices keep rtn, with a warning that names the reason."""
    folder = tiny_llama(tmp_path / "model", layers=2, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    claims = claims_of(FolderSource(folder), {"scheme": "nvfp4a16", "solver": GPTQ})
    heard = _Warned()
    _walk(folder, claims, tmp_path / "walk", progress=heard)
    (warning,) = (text for text in heard.warnings if "all zero" in text)
    assert "model.layers.1.self_attn." in warning


def test_nothing_passes_where_nothing_is_heard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain rounding walks only to be polished: no block runs, and a rerun goes on."""
    runs: list[str] = []
    run = Tape.run

    def counted(self: Tape, block: Block, *args: Any, **options: Any) -> torch.Tensor | None:
        runs.append(block.path)
        return run(self, block, *args, **options)

    monkeypatch.setattr(Tape, "run", counted)
    claims = claims_of(FolderSource(folder), {"scheme": "nvfp4a16"})
    _walk(folder, claims, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _walk(folder, claims, tmp_path / "part", progress=_Stopping(6))
    again = _Warned()
    assert _walk(folder, claims, tmp_path / "part", progress=again)
    assert again.notes[0] == "model.layers.1"
    assert _hashes(tmp_path / "part") == _hashes(tmp_path / "whole")
    assert runs == []
    ranged = claims_of(FolderSource(folder), {"scheme": "fp8_static"})
    _walk(folder, ranged, tmp_path / "ranged")
    assert set(runs) == {f"model.layers.{index}" for index in range(3)}


class _Threads(Silent):
    """Counts the threads of this process while matrices are solved."""

    def __init__(self) -> None:
        self.most = 0

    def advance(self, amount: int, note: str = "") -> None:
        self.most = max(self.most, len(os.listdir("/proc/self/task")))


@pytest.fixture
def four_threads() -> Iterator[None]:
    """For torch, whatever this process was given."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.usefixtures("four_threads")
def test_passes_that_wait_keep_few_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a team of OpenMP's: of 24 batches none waits where so many teams are too many."""
    folder = tiny_llama(tmp_path / "model", layers=1, hidden=256, intermediate=512)
    hashes, most = [], []
    for name, threads in (("all", 512), ("few", 48)):
        monkeypatch.setattr(paused, "_MOST_THREADS", threads)
        source, told = FolderSource(folder), _Threads()
        target = tmp_path / name
        target.mkdir()
        claims = claims_of(source, {"scheme": "nvfp4a16", "solver": GPTQ})
        walk(source, claims, some_tokens(24, 128), replace(SPEC, batch_tokens=128), target, told)
        hashes.append(_hashes(target))
        most.append(told.most)
    assert hashes[0] == hashes[1]
    # Passes and the teams' other threads; the process has its own besides.
    assert most[0] >= 24 * 4 > 48 > most[1]
