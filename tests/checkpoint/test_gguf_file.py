"""GGUF headers: equal to the library's reading of sound files, and a message for every other file."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compressor.checkpoint.gguf_file import read_gguf_header
from compressor.errors import CheckpointError
from tests.checkpoint.tiny_gguf import tiny_gguf


def string(text: str | bytes) -> bytes:
    """A GGUF string."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def preamble(tensors: int = 0, entries: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    """The fixed part of a file."""
    return magic + struct.pack("<IQQ", version, tensors, entries)


def tensor(
    name: str = "w", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    """A tensor's entry, shape as GGUF has it (fastest first)."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape) if rank is None else rank, *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def entry(key: str, kind: int, value: bytes) -> bytes:
    """A metadata entry."""
    return string(key) + struct.pack("<I", kind) + value


def padded(head: bytes, data: int = 0) -> bytes:
    """The header padded to 32 bytes and ``data`` zero bytes."""
    return head + bytes(-len(head) % 32) + bytes(data)


@pytest.mark.parametrize("kind", ["Q4_1", "F16"])
def test_agrees_with_the_library(tmp_path: Path, kind: str) -> None:
    """Every metadata value and every tensor's type, shape, size and place."""
    path = tiny_gguf(tmp_path / "m.gguf", kind=kind)
    header, theirs = read_gguf_header(path), GGUFReader(path)
    expected = {name: field.contents() for name, field in theirs.fields.items() if "GGUF." not in name}
    assert header.metadata == expected
    assert {
        (found.name, found.kind, found.shape[::-1], found.offset, found.nbytes)
        for found in header.tensors.values()
    } == {
        (part.name, part.tensor_type.name, tuple(part.shape.tolist()), part.data_offset, part.n_bytes)
        for part in theirs.tensors
    }
    assert header.file_bytes == path.stat().st_size


BIG = 2**62
BAD_FILES = {
    "empty": (b"", "does not begin with the letters GGUF"),
    "other magic": (preamble(magic=b"GGML"), "does not begin with the letters GGUF"),
    "cut in the preamble": (preamble()[:10], "truncated or corrupt"),
    "version 1": (preamble(version=1), "version 1; known: 2, 3"),
    "big-endian": (preamble(version=3 << 24), "version 50331648"),
    "tensor bomb": (preamble(tensors=BIG), "more than it has room for"),
    "metadata bomb": (preamble(entries=BIG), "more than it has room for"),
    "key bomb": (preamble(entries=1) + struct.pack("<Q", BIG) + bytes(16), "a string of"),
    "string beyond the end": (
        preamble(entries=1) + string("k") + struct.pack("<IQ", 8, 99),
        "asks for 99 more",
    ),
    "array bomb": (preamble(entries=1) + entry("k", 9, struct.pack("<IQ", 4, BIG)), "numbers, more than"),
    "array of strings bomb": (
        preamble(entries=1) + entry("k", 9, struct.pack("<IQ", 8, BIG)),
        "strings, more",
    ),
    "array of arrays": (preamble(entries=1) + entry("k", 9, struct.pack("<IQ", 9, 1)), "items of type 9"),
    "unknown value type": (preamble(entries=1) + entry("k", 77, bytes(8)), "unknown type 77"),
    "not UTF-8": (preamble(entries=1) + entry("k", 8, string(b"\xff\xfe")), "not UTF-8"),
    "repeated key": (preamble(entries=2) + 2 * entry("k", 0, b"\1"), "'k' occurs twice"),
    "odd alignment": (
        preamble(entries=1) + entry("general.alignment", 4, struct.pack("<I", 33)),
        "impossible general.alignment 33",
    ),
    "endless rank": (preamble(tensors=1) + tensor(rank=2**31), "2147483648 dimensions"),
    "no rank": (preamble(tensors=1) + tensor(shape=()) + bytes(8), "0 dimensions"),
    "escape in a name": (preamble(tensors=1) + tensor("\x1b[2J"), "unprintable"),
    "absurd size": (preamble(tensors=1) + tensor(shape=(2**63, 2**63)), "impossible shape"),
    "empty tensor": (preamble(tensors=1) + tensor(shape=(0,)), "does not fit F32"),
    "ragged blocks": (preamble(tensors=1) + tensor(shape=(33,), kind=2), "does not fit Q4_0 blocks of 32"),
    "unknown ggml type": (preamble(tensors=1) + tensor(kind=9999), "unknown ggml type 9999"),
    "data missing": (padded(preamble(tensors=1) + tensor(), 127), "truncated: tensor w ends at byte"),
    "offset beyond the end": (padded(preamble(tensors=1) + tensor(offset=BIG), 128), "truncated: tensor w"),
    "overlap": (padded(preamble(tensors=2) + tensor("a") + tensor("b", offset=64), 256), "b overlaps"),
    "repeated tensor": (padded(preamble(tensors=2) + tensor() + tensor(offset=128), 256), "w occurs twice"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_refuses(tmp_path: Path, name: str) -> None:
    """Each malformed file gets one short message that names it."""
    content, message = BAD_FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_gguf_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound file."""
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 2**20),
)
def test_damage_never_escapes(sound: bytes, tmp_path: Path, edits: list[tuple[int, int]], cut: int) -> None:
    """Whatever bytes are changed or lost, nothing but ``CheckpointError`` comes out."""
    content = bytearray(sound)
    for position, value in edits:
        content[position] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content[:cut])
    try:
        header = read_gguf_header(path)
    except CheckpointError:
        return
    assert all(found.offset + found.nbytes <= cut for found in header.tensors.values())
