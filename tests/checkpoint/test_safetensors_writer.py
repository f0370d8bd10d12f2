"""Shards are byte for byte those of the library, and appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.checkpoint.safetensors_file import read_header, safetensors_dtype
from compressor.checkpoint.safetensors_writer import ShardWriter, shard_names, write_index
from compressor.errors import UserError
from compressor.spec import TensorHeader
from tests.checkpoint.test_safetensors_file import every_dtype


def headers_of(tensors: dict[str, torch.Tensor]) -> list[TensorHeader]:
    """The headers of tensors in memory."""
    return [
        TensorHeader(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}])
def test_same_bytes_as_the_library(tmp_path: Path, metadata: dict[str, str]) -> None:
    """All dtypes, odd names and shapes, written in a random order."""
    tensors = every_dtype() | {
        'quote"\\ü': torch.ones(3),
        "model.b": torch.ones(2, 2).T,
        "model.a": torch.ones(1),
    }
    theirs = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(theirs, tmp_path / "theirs.safetensors", metadata=metadata or None)
    headers, names = headers_of(tensors), list(tensors)
    random.Random(0).shuffle(headers)
    random.Random(1).shuffle(names)
    with ShardWriter(tmp_path / "ours.safetensors", headers, metadata) as writer:
        for name in names:
            writer.write(name, tensors[name])
    ours = (tmp_path / "ours.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()
    assert writer.nbytes == len(ours)


def test_appears_only_when_whole(tmp_path: Path) -> None:
    """Before ``close`` there is a temporary file only; after an exception there is nothing."""
    tensor = torch.ones(4)
    path = tmp_path / "x.safetensors"
    with ShardWriter(path, headers_of({"a": tensor})) as writer:
        writer.write("a", tensor)
        assert [file.name for file in tmp_path.iterdir()] == [f"x.safetensors.tmp-{os.getpid()}"]
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    path.unlink()
    with pytest.raises(KeyboardInterrupt), ShardWriter(path, headers_of({"a": tensor})):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_of_a_killed_run_is_overwritten(tmp_path: Path) -> None:
    """A temporary file of the same name, longer than the new one, leaves no trace."""
    tensor = torch.ones(4)
    (tmp_path / f"x.safetensors.tmp-{os.getpid()}").write_bytes(b"x" * 10_000)
    with ShardWriter(tmp_path / "x.safetensors", headers_of({"a": tensor})) as writer:
        writer.write("a", tensor)
    assert read_header(tmp_path / "x.safetensors").headers.keys() == {"a"}


def write(path: Path, *tensors: torch.Tensor) -> None:
    """Writes tensors under one name into a file whose header says four fp32 values."""
    with ShardWriter(path, headers_of({"a": torch.ones(4)})) as writer:
        for tensor in tensors:
            writer.write("a", tensor)


def test_programmers_faults(tmp_path: Path) -> None:
    """A tensor missing, written twice, or unlike its header is an assertion, and no file appears."""
    path = tmp_path / "x.safetensors"
    with pytest.raises(AssertionError, match=r"never written: \['a'\]"):
        write(path)
    with pytest.raises(AssertionError, match="written twice"):
        write(path, torch.ones(4), torch.ones(4))
    for wrong in (torch.ones(5), torch.ones(4, dtype=torch.float64), torch.ones(2, 2)):
        with pytest.raises(AssertionError, match="a: "):
            write(path, wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """No space left: one clear message, and no half file stays behind."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=r"(?s)disk full.*nothing is lost: free .* GB"):
        write(tmp_path / "x.safetensors", torch.ones(4))
    assert list(tmp_path.iterdir()) == []


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may write less than asked (it does above 2 GiB)."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    tensors = every_dtype()
    with ShardWriter(tmp_path / "ours.safetensors", headers_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_shard_names() -> None:
    """Hugging Face names."""
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(12)[::11] == ["model-00001-of-00012.safetensors", "model-00012-of-00012.safetensors"]


def test_index(tmp_path: Path) -> None:
    """One shard needs no index; several have one that names each tensor's shard."""
    write_index(tmp_path, {"model.safetensors": ["a", "b"]}, 10)
    assert list(tmp_path.iterdir()) == []
    write_index(tmp_path, {"one.safetensors": ["b"], "two.safetensors": ["a", "c"]}, 10)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 10},
        "weight_map": {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"},
    }
    assert len(list(tmp_path.iterdir())) == 1
