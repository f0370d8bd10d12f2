"""Any checkpoint's tensors, read one by one from files that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.checkpoint.stored import StoredTensors
from compressor.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    "a.weight_scale_2": torch.tensor(0.25),
    "b.weight": torch.randn(3, 2).to(torch.float8_e4m3fn),
}


def _sharded(folder: Path) -> None:
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        file = f"part-{number}.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [True, False])
def test_every_tensor_as_it_lies(sharded: bool, tmp_path: Path) -> None:
    """Packed dtypes and tensors without dimensions included, from one file or many."""
    _sharded(tmp_path) if sharded else save_file(TENSORS, tmp_path / "model.safetensors")
    stored = StoredTensors(tmp_path)
    assert stored.headers.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = stored.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    with pytest.raises(CheckpointError, match="tensor c is missing"):
        stored.read("c")


def test_small_files_have_a_cap_and_stay_inside(tmp_path: Path) -> None:
    """A config of a gigabyte is not read, nor is one that lies elsewhere."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "linked.json").symlink_to(tmp_path / "secret.json")
    (folder / "large.json").write_bytes(b"")
    with (folder / "large.json").open("wb") as file:
        file.truncate(1 << 30)
    stored = StoredTensors(folder)
    assert stored.has_file("large.json")
    assert not stored.has_file("absent.json")
    for name, reason in (
        ("linked.json", "link out of the folder"),
        ("large.json", "larger than"),
        ("absent.json", "missing"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            stored.small_file(name)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    """No folder, no weights, weights that lie elsewhere, and an index that lies."""
    with pytest.raises(CheckpointError, match="no such folder"):
        StoredTensors(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        StoredTensors(tmp_path)
    save_file(TENSORS, tmp_path / "elsewhere.safetensors")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="link out of the folder"):
        StoredTensors(linked)
    lying = tmp_path / "lying"
    lying.mkdir()
    _sharded(lying)
    save_file({"other": torch.zeros(1)}, lying / "part-0.safetensors")
    with pytest.raises(CheckpointError, match=r"says that tensor 'a.weight' is in part-0"):
        StoredTensors(lying)
