"""Headers are believed only when they are true; tensors come back bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file

from compressor.checkpoint.safetensors_file import (
    _TORCH_NAMES,
    parse_header,
    read_header,
    read_tensor,
    torch_dtype,
)
from compressor.errors import CheckpointError
from compressor.spec import DTYPE_BYTES, TensorHeader


def every_dtype() -> dict[str, torch.Tensor]:
    """A tensor of random bits for each dtype, and the shapes that are easily got wrong."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in _TORCH_NAMES:
        bits = torch.randint(0, 2 if name == "BOOL" else 256, (24,), dtype=torch.uint8, generator=generator)
        tensors[f"t.{name}"] = bits.view(torch_dtype(name)).reshape(1, -1)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["experts"] = torch.randn(3, 4, 5, generator=generator)
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def file_of(header: object, data: int = 0) -> bytes:
    """A safetensors file with any JSON as header and ``data`` zero bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    """One header entry, true unless told otherwise."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_tables_agree() -> None:
    """Every dtype of the shared table can be read, with the size that the table says."""
    assert _TORCH_NAMES.keys() == DTYPE_BYTES.keys()
    assert {name: torch_dtype(name).itemsize for name in DTYPE_BYTES} == DTYPE_BYTES


def test_reads_every_dtype(tmp_path: Path) -> None:
    """Headers, metadata and bits of every dtype, the scalar and the empty tensor."""
    tensors = every_dtype()
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = read_header(path)
    assert file.metadata == {"format": "pt"}
    assert file.headers.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = read_tensor(path, file.headers[name], file.offsets[name])
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(bits(found), bits(tensor))


def test_reads_one_expert(tmp_path: Path) -> None:
    """``index`` reads one entry along the first dimension and nothing else."""
    tensors = every_dtype()
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    file = read_header(path)
    for index in range(3):
        found = read_tensor(path, file.headers["experts"], file.offsets["experts"], index)
        assert torch.equal(found, tensors["experts"][index])


BAD_FILES = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "header longer than the file": (file_of({})[:8] + b"{", "truncated shard: the header claims"),
    "header bomb": ((10**12).to_bytes(8, "little"), "a header of 1,000,000,000,000 bytes"),
    "not JSON": (file_of(b"{nonsense"), "not valid JSON"),
    "no object": (file_of(b"[]"), "not a JSON object"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "endless nesting": (file_of(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "giant number": (file_of(b'{"a":' + b"9" * 5_000 + b"}"), "not valid JSON"),
    "repeated name": (file_of(b'{"a": 1, "a": 2}'), "duplicate name 'a'"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry without offsets": (file_of({"a": {"dtype": "F32", "shape": []}}), "must have dtype"),
    "unknown dtype": (file_of({"a": entry(dtype="F7")}, 8), "unknown dtype 'F7'; known: BOOL"),
    "dtype of a wrong type": (file_of({"a": entry(dtype=["F32"])}, 8), "unknown dtype"),
    "negative size": (file_of({"a": entry(shape=[-2])}, 8), "impossible shape"),
    "absurd size": (file_of({"a": entry(shape=[2**60, 2**60])}, 8), "impossible shape"),
    "truth as size": (file_of({"a": entry(shape=[True, 2])}, 8), "impossible shape"),
    "float size": (file_of({"a": entry(shape=[2.0])}, 8), "impossible shape"),
    "endless rank": (file_of({"a": entry(shape=[1] * 1000)}, 8), "at most 32"),
    "escape in a name": (file_of({"\x1b[2J": entry()}, 8), "unprintable"),
    "name without end": (file_of({"a" * 5000: entry()}, 8), "too long"),
    "three offsets": (file_of({"a": entry(offsets=[0, 4, 8])}, 8), "impossible data_offsets"),
    "backward offsets": (file_of({"a": entry(offsets=[8, 0])}, 8), "impossible data_offsets"),
    "negative offsets": (file_of({"a": entry(offsets=[-8, 0])}, 8), "impossible data_offsets"),
    "size mismatch": (file_of({"a": entry(offsets=[0, 4])}, 4), "needs 8 bytes, the header gives it 4"),
    "overlap": (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, 12), "tensor b: its data overlaps"),
    "gap": (file_of({"a": entry(), "b": entry(offsets=[12, 20])}, 20), "tensor b: its data leaves a gap"),
    "data missing": (file_of({"a": entry()}, 7), "truncated shard: its tensors need 8 bytes"),
    "data left over": (file_of({"a": entry()}, 9), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_refuses(tmp_path: Path, name: str) -> None:
    """Each lie gets a message of one or two lines that names the file."""
    content, message = BAD_FILES[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_truncated_says_download_again(tmp_path: Path) -> None:
    """The commonest fault tells its mend."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"a": entry()}, 7))
    with pytest.raises(CheckpointError, match="download the file again"):
        read_header(path)


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is the user's fault, not a traceback."""
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "absent.safetensors")


def test_file_cut_after_opening(tmp_path: Path) -> None:
    """Reading past the end names the tensor."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\0" * 4)
    with pytest.raises(CheckpointError, match="truncated shard: it ends inside tensor w"):
        read_tensor(path, TensorHeader("w", "F32", (2,)), 0)


WHOLE = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=3), st.integers(0, 40)
)
def test_accepts_only_what_the_library_accepts(edits: list[tuple[int, int]], cut: int) -> None:
    """Whatever bytes are changed or cut off, we raise ``CheckpointError`` or agree with safetensors."""
    content = bytearray(WHOLE)
    for position, value in edits:
        content[position] = value
    content = content[: len(content) - (cut if cut < 30 else 0)]
    length = int.from_bytes(content[:8], "little")
    try:
        found = parse_header(bytes(content[8 : 8 + length]), 8 + length, len(content), "x")
    except CheckpointError:
        return
    theirs: dict[str, Any] = dict(deserialize(bytes(content)))
    assert {name: list(header.shape) for name, header in found.headers.items()} == {
        name: part["shape"] for name, part in theirs.items()
    }


def test_library_refuses_the_worst() -> None:
    """The reference implementation agrees that gaps and overlaps are faults (so the test above has teeth)."""
    for name in ("gap", "overlap", "data left over"):
        with pytest.raises(SafetensorError):
            deserialize(BAD_FILES[name][0])


def test_many_headers_are_quick_and_need_no_torch(tmp_path: Path) -> None:
    """100,000 tensors in 10 shards of a sparse 200 GB: seconds, little memory, and torch stays out."""
    per_shard, numel = 10_000, 1_000_000
    for shard in range(10):
        entries = {
            f"model.layers.{shard}.mlp.experts.{number}.w": {
                "dtype": "BF16",
                "shape": [1000, 1000],
                "data_offsets": [number * numel * 2, (number + 1) * numel * 2],
            }
            for number in range(per_shard)
        }
        content = file_of(entries)
        with (tmp_path / f"{shard}.safetensors").open("wb") as file:
            file.write(content)
            file.truncate(len(content) + per_shard * numel * 2)
    code = (
        "import sys; from pathlib import Path\n"
        "from compressor.checkpoint.safetensors_file import read_header\n"
        "files = [read_header(path) for path in Path(sys.argv[1]).iterdir()]\n"
        "assert sum(len(file.headers) for file in files) == 100_000\n"
        "assert 'torch' not in sys.modules\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 200_000, "KiB"
    assert time.monotonic() - begin < 20, "about 1.5 s on an idle core"
