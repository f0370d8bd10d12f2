"""Folders in the Hugging Face layout: read lazily, and refused with a reason when they are not sound."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.folder import (
    MAX_SAMPLES,
    SAMPLE_BYTES,
    FolderSource,
    file_samples,
    sample_step,
)
from compressor.errors import CheckpointError
from tests.tiny import tiny_llama, tiny_llama4

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded and a single-file model."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "sharded", shards=3)
    tiny_llama(root / "single")
    return root


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    """A sharded model that the test may spoil."""
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


@pytest.mark.parametrize("name", ["sharded", "single"])
def test_reads_what_the_library_reads(originals: Path, name: str) -> None:
    """Names, headers and bits over all shards."""
    source = FolderSource(originals / name)
    expected = {}
    for file in (originals / name).glob("*.safetensors"):
        expected.update(load_file(file))
    assert source.headers.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        assert source.headers[tensor_name].shape == tuple(tensor.shape)
        assert torch.equal(source.read(tensor_name), tensor)
    assert source.kind == "safetensors"
    assert source.config["model_type"] == "llama"
    assert source.model_dir() == originals / name
    assert source.gguf_file() is None


def test_reads_one_expert(tmp_path: Path) -> None:
    """One expert of a fused tensor, without the others."""
    source = FolderSource(tiny_llama4(tmp_path / "m"))
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    assert source.headers[name].shape[0] == 4
    assert torch.equal(source.read(name, 2), source.read(name)[2])


def test_fingerprint(originals: Path, sharded: Path) -> None:
    """Equal for a copy; changes with a weight, the config or a shape, though sizes stay."""
    first = FolderSource(originals / "sharded").fingerprint
    assert FolderSource(sharded).fingerprint == first
    config = sharded / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    changed = FolderSource(sharded).fingerprint
    assert changed != first
    config.write_text(text)
    shard = next(sharded.glob("*.safetensors"))
    tensors = load_file(shard)
    save_file({name: -tensor for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})
    assert FolderSource(sharded).fingerprint not in (first, changed)


def test_change_while_in_use(sharded: Path) -> None:
    """A file rewritten after opening is noticed at the next read."""
    source = FolderSource(sharded)
    name = next(iter(source.headers))
    for shard in sharded.glob("*.safetensors"):
        os.utime(shard, (1, 1))
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        source.read(name)


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Saves other weights into a shard and gives it the old time of modification."""
    before = path.stat()
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def test_fingerprint_samples_every_tensor(originals: Path, tmp_path: Path) -> None:
    """One projection multiplied by 3 is another source, whichever it is, even with the time put back."""
    folder = Path(shutil.copytree(originals / "single", tmp_path / "model"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    rewrite(path, tensors)
    seen = {FolderSource(folder).fingerprint}
    for name in tensors:
        rewrite(path, {**tensors, name: tensors[name] * 3})
        seen.add(FolderSource(folder).fingerprint)
    assert len(seen) == 1 + len(tensors)


def test_fingerprint_has_the_time_of_every_shard(sharded: Path) -> None:
    """A change between the samples shows there."""
    first = FolderSource(sharded).fingerprint
    for path in sharded.glob("*.safetensors"):
        times = path.stat()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1000))
        assert FolderSource(sharded).fingerprint != first
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert FolderSource(sharded).fingerprint == first


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_fingerprint_has_the_side_files(sharded: Path, name: str) -> None:
    """Another tokenizer or template is another source."""
    first = FolderSource(sharded).fingerprint
    with (sharded / name).open("a") as file:
        file.write(" ")
    changed = FolderSource(sharded).fingerprint
    (sharded / name).unlink()
    assert len({first, changed, FolderSource(sharded).fingerprint}) == 3


def test_samples_are_few_however_many_tensors(tmp_path: Path) -> None:
    """Three reads a tensor until there are too many; then fewer, but still spread over all of them."""
    assert sample_step(1) == sample_step(MAX_SAMPLES // 3) == 1
    assert 3 * 100_000 / sample_step(100_000) <= MAX_SAMPLES
    path = tmp_path / "file"
    path.write_bytes(bytes(range(250)) * 20)
    assert list(file_samples(path, [(0, 3), (1000, 2000)], 1)) == [
        *[bytes(range(3))] * 3,
        *[path.read_bytes()[start : start + SAMPLE_BYTES] for start in (1000, 1744, 2488)],
    ]
    assert len(list(file_samples(path, [(place, 1) for place in range(5000)], sample_step(100_000)))) == 1500


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Changes the weight map in place."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def shard(folder: Path, number: int) -> Path:
    """The path of a shard of three."""
    return folder / f"model-0000{number}-of-00003.safetensors"


def _missing_shard(folder: Path) -> None:
    shard(folder, 2).unlink()


def _truncated_shard(folder: Path) -> None:
    path = shard(folder, 2)
    os.truncate(path, path.stat().st_size - 1)


def _parent_path(folder: Path) -> None:
    shutil.copy(shard(folder, 2), folder.parent / "x.safetensors")
    edit_index(folder, lambda names: names.update(dict.fromkeys(names, "../x.safetensors")))


def _absolute_path(folder: Path) -> None:
    edit_index(folder, lambda names: names.update({"lm_head.weight": str(shard(folder, 1))}))


def _link_out(folder: Path) -> None:
    shard(folder, 2).rename(folder.parent / "x.safetensors")
    shard(folder, 2).symlink_to("../x.safetensors")


def _config_link_out(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


def _pickle_in_index(folder: Path) -> None:
    edit_index(folder, lambda names: names.update({"lm_head.weight": "evil.bin"}))


def _absent_tensor(folder: Path) -> None:
    edit_index(folder, lambda names: names.update({"model.extra.weight": shard(folder, 1).name}))


def _duplicate_tensor(folder: Path) -> None:
    tensors = load_file(shard(folder, 1)) | load_file(shard(folder, 2))
    save_file(tensors, shard(folder, 2))


def _index_without_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def _index_lost(folder: Path) -> None:
    (folder / INDEX).unlink()


def _config_lost(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_broken(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _config_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return edit


def _deep_config(folder: Path) -> None:
    _edit_config()(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"a": ' + "[" * 500 + "]" * 500 + ", " + text[1:])


def _large_tokenizer(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 200_000_001)


def _quantized_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))


def _quantized_tensor(folder: Path) -> None:
    tensors = load_file(shard(folder, 1))
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, shard(folder, 1))


def _no_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def _pickles_only(folder: Path) -> None:
    _no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def _gguf_only(folder: Path) -> None:
    _no_weights(folder)
    (folder / "model.gguf").write_bytes(b"GGUF")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_missing_shard, "model-00002-of-00003.safetensors is missing"),
        (_truncated_shard, "truncated shard"),
        (_parent_path, "outside the folder: '../x.safetensors'"),
        (_absolute_path, "outside the folder"),
        (_link_out, "is a link out of the folder"),
        (_config_link_out, "config.json is a link out of the folder"),
        (_pickle_in_index, "'evil.bin', not a safetensors file"),
        (_absent_tensor, "says that tensor 'model.extra.weight' is in"),
        (_duplicate_tensor, "lies in both model-00001"),
        (_index_without_map, "has no weight_map"),
        (_index_lost, "3 safetensors files but no model.safetensors.index.json"),
        (_config_lost, "config.json is missing"),
        (_config_broken, "config.json is not valid JSON"),
        (_config_list, "config.json is not a JSON object"),
        (_edit_config(model_type=["llama"]), r"model_type is \['llama'\], not a name"),
        (_edit_config(text_config={"model_type": {}}), "model_type is {}, not a name"),
        (_edit_config(architectures=5), "architectures is 5, not a list of names"),
        (_edit_config(architectures=["Llama", None]), "not a list of names"),
        (_edit_config(head_dim=10**30), "'head_dim' has 10000000"),
        (_edit_config(rope={"factors": [1, -(2**53)]}), r"'factors\[\]' has -9007199254740992, beyond"),
        (_deep_config, "nested more than 32 deep"),
        (_large_tokenizer, "larger than 200,000,000 bytes"),
        (_quantized_config, r"already quantized: .*\(compressed-tensors\)"),
        (_quantized_tensor, r"(?s)already quantized: tensor .* is F8_E4M3.*GGUF sources are dequantized"),
        (_no_weights, "no safetensors weights"),
        (
            _pickles_only,
            r"(?s)pytorch_model.bin.*pickle files can run code when loaded.*convert to safetensors",
        ),
        (_gguf_only, r"(?s)a folder of GGUF files.*model.gguf"),
    ],
)
def test_refuses(sharded: Path, spoil: Callable[[Path], None], message: str) -> None:
    """Each unsound folder is refused when it is opened, with a message that names it."""
    spoil(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        FolderSource(sharded)
    assert str(sharded) in str(caught.value)


def test_link_inside_is_fine(sharded: Path) -> None:
    """A link to another file of the same folder is harmless."""
    shard(sharded, 2).rename(sharded / "blob")
    shard(sharded, 2).symlink_to("blob")
    source = FolderSource(sharded)
    assert all(source.read(name).numel() for name in source.headers)


def _snapshot(folder: Path, root: Path, blobs: str = "models--org--name/blobs") -> Path:
    """The folder as the Hub's cache holds it: links to blobs."""
    home = root / blobs
    home.mkdir(parents=True)
    snapshot = root / "models--org--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, home / f"blob-{number}")
        (snapshot / path.name).symlink_to(os.path.relpath(home / f"blob-{number}", snapshot))
    return snapshot


def test_snapshot_of_the_hub_cache_is_read(sharded: Path, tmp_path: Path) -> None:
    """Links to the repository's own blobs are files of the folder."""
    snapshot = _snapshot(sharded, tmp_path / "hub")
    ours, plain = FolderSource(snapshot), FolderSource(sharded)
    assert ours.headers == plain.headers
    name = next(iter(plain.headers))
    assert torch.equal(ours.read(name), plain.read(name))


@pytest.mark.parametrize("blobs", ["models--org--other/blobs", "models--org--name/blobs/deeper", "elsewhere"])
def test_snapshot_with_other_links_is_refused(sharded: Path, tmp_path: Path, blobs: str) -> None:
    """Another repository's blobs, and anything else, stay out of bounds."""
    with pytest.raises(CheckpointError, match="link out of the folder"):
        FolderSource(_snapshot(sharded, tmp_path / "hub", blobs))
