"""Texts packed by xz: read as what they unpack to, and nothing that a stranger packs takes the memory."""

from __future__ import annotations

import json
import lzma
import tracemalloc
from pathlib import Path

import pytest

from compressor import data
from compressor.calibration.documents import open_documents
from compressor.calibration.spec import DatasetSpec
from compressor.errors import UserError
from compressor.evals.text import read_text

TEXTS = ["a b", "", "é" * 3]


def _lines() -> bytes:
    return "\n".join(json.dumps({"id": str(n), "text": text}) for n, text in enumerate(TEXTS, 1)).encode()


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_packed_lines_are_those_of_the_plain_file(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both readers of texts, however the bytes come; hash and size are those of the plain file."""
    monkeypatch.setattr(data, "_CHUNK_BYTES", chunk)
    plain, packed = tmp_path / "t.jsonl", tmp_path / "p.JSONL.xz"
    plain.write_bytes(_lines())
    packed.write_bytes(lzma.compress(_lines()))
    assert read_text(packed.rename(tmp_path / "p.jsonl.xz")) == read_text(plain) == "\n\n".join(TEXTS)
    packed = tmp_path / "p.jsonl.xz"
    assert list(open_documents(DatasetSpec(name="p", path=packed), 1, 0)) == TEXTS
    assert data.scan_text(packed) == data.scan_text(plain)
    assert data.text_bytes(packed) == plain.stat().st_size


def test_a_large_text_comes_in_parts(tmp_path: Path) -> None:
    """A hundred kilobytes that unpack to 64 MB take no more memory than a part of them."""
    path = tmp_path / "t.txt.xz"
    path.write_bytes(lzma.compress(bytes(64 << 20), preset=0))
    tracemalloc.start()
    assert data.text_bytes(path) == 64 << 20
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it has given more than any text may have, not when memory is full."""
    monkeypatch.setattr(data, "MAX_UNPACKED_BYTES", 1 << 20)
    path = tmp_path / "t.jsonl.xz"
    path.write_bytes(lzma.compress(bytes(1 << 20)))
    assert data.text_bytes(path) == 1 << 20
    path.write_bytes(lzma.compress(bytes((1 << 20) + 1)))
    for read in (read_text, data.scan_text, lambda path: open_documents(DatasetSpec("t", path), 1, 0)):
        with pytest.raises(UserError, match="larger than 1 MiB") as caught:
            read(path)
        assert caught.value.where == str(path)


def test_a_dictionary_larger_than_any_preset_needs_is_refused(tmp_path: Path) -> None:
    """The header alone asks for it."""
    path = tmp_path / "t.txt.xz"
    path.write_bytes(
        lzma.compress(b"a", filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 28}])
    )
    with pytest.raises(UserError, match="not a text packed by xz"):
        read_text(path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    """Cut off, damaged, no xz at all, something behind the text."""
    whole, path = lzma.compress(_lines()), tmp_path / "t.jsonl.xz"
    middle = len(whole) // 2
    for raw, message in (
        (whole[:-1], "cut off"),
        (b"", "cut off"),
        (whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :], "not a text packed by xz"),
        (_lines(), "not a text packed by xz"),
        (whole + whole, "follows the xz stream"),
    ):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=message):
            read_text(path)
