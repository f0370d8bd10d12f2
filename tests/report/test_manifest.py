"""The manifest lists every file, tells every change, and trusts no name in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import CheckpointError
from compressor.progress import Silent
from compressor.report.manifest import check_manifest, read_manifest, write_manifest
from compressor.spec import TensorHeader


@dataclass
class FakeSource:
    """Only the identity of a source is used here."""

    label: str = "org/model@abc"
    kind: Any = "safetensors"
    note: str = ""
    revision: str | None = "abc"
    config: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, TensorHeader] = field(default_factory=dict)
    fingerprint: str = "f" * 64

    def read(self, name: str) -> Any:
        raise AssertionError(name)

    def write_side_files(self, folder: Path) -> list[str]:
        raise AssertionError(folder)

    def model_dir(self) -> Path | None:
        return None

    def gguf_file(self) -> str | None:
        return None


class Bytes(Silent):
    """Counts the bytes announced and reported."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, stage: str, total: int, unit: Any, done: int = 0) -> None:
        self.total += total

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount


def make(folder: Path, **texts: str) -> Path:
    """A small output folder with its manifest."""
    folder.mkdir()
    (folder / "sub").mkdir()
    contents = {
        "config.json": "{}",
        "model.safetensors": "weights" * 1000,
        "sub/merges.txt": "a b",
        "report.json": "12 s",
        "README.md": "card",
    }
    for name, text in (contents | texts).items():
        (folder / name).write_text(text)
    write_manifest(folder, key="k", source=FakeSource(), versions={"torch": "2.13.0"}, seed=7)
    return folder


def test_manifest_on_disk(tmp_path: Path) -> None:
    """Every file with its sha256 and size, the manifest left out; what it was made from."""
    folder = make(tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == {"label": "org/model@abc", "revision": "abc", "fingerprint": "f" * 64}
    assert (manifest["seed"], manifest["versions"]) == (7, {"torch": "2.13.0"})
    assert set(manifest["files"]) == {
        "config.json",
        "model.safetensors",
        "sub/merges.txt",
        "report.json",
        "README.md",
    }
    for name, facts in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert not list(folder.glob("*.tmp-*"))
    assert check_manifest(folder) == []


def test_content_hash_is_of_what_a_second_run_reproduces(tmp_path: Path) -> None:
    """Times in report and card do not touch it; a weight, a name and a config do."""
    first = read_manifest(make(tmp_path / "a")).content_sha256
    other = {"report.json": "99 s", "README.md": "other", "report.html": "page"}
    assert read_manifest(make(tmp_path / "b", **other)).content_sha256 == first
    changed = [{"config.json": "{ }"}, {"model.safetensors": "w"}, {"new.txt": ""}, {"sub/README.md": ""}]
    hashes = {
        read_manifest(make(tmp_path / f"c{i}", **texts)).content_sha256 for i, texts in enumerate(changed)
    }
    assert len(hashes | {first}) == 5


def test_content_hash_by_hand(tmp_path: Path) -> None:
    """The definition, written out a second time."""
    folder = make(tmp_path / "out")
    pairs = [
        [name, hashlib.sha256((folder / name).read_bytes()).hexdigest()]
        for name in ("config.json", "model.safetensors", "sub/merges.txt")
    ]
    expected = hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()
    assert read_manifest(folder).content_sha256 == expected


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    """The old manifest is not among the files of the new one."""
    folder = make(tmp_path / "out")
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, key="k", source=FakeSource(), versions={"torch": "2.13.0"}, seed=7)
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: other content (sha256)"),
        (lambda folder: (folder / "config.json").write_text("{ }"), "config.json: 3 bytes instead of 2"),
        (lambda folder: (folder / "extra.bin").write_text("x"), "extra.bin: not in the manifest"),
        (lambda folder: (folder / "sub" / "x\x1b").write_text("x"), "sub/x\\x1b: not in the manifest"),
    ],
)
def test_every_change_is_one_difference(
    tmp_path: Path, change: Callable[[Path], object], difference: str
) -> None:
    """Missing, altered, resized and added files, each named."""
    folder = make(tmp_path / "out")
    change(folder)
    assert check_manifest(folder) == [difference]


def test_what_the_hubs_tools_add_is_no_difference(tmp_path: Path) -> None:
    """Downloads come with hidden files and through links to a cache."""
    folder = make(tmp_path / "out")
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("x")
    (folder / "config.json").rename(tmp_path / "blob")
    (folder / "config.json").symlink_to(tmp_path / "blob")
    assert check_manifest(folder) == []


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites the manifest after ``change``."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "sub/../../outside", "", "."])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    """A manifest may not have files outside hashed, even with the right facts."""
    folder = make(tmp_path / "out")
    (tmp_path / "outside").write_text("x")
    facts = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    edit(folder, lambda manifest: manifest["files"].update({name: facts}))
    assert f"{name}: names no file of this folder" in check_manifest(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b"])
def test_names_that_no_system_has(tmp_path: Path, name: str) -> None:
    """Too long or with a NUL: a difference, not an exception."""
    folder = make(tmp_path / "out")
    edit(folder, lambda manifest: manifest["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    assert any("cannot be read" in line or "missing" in line for line in check_manifest(folder))


def test_endless_file_is_not_read(tmp_path: Path) -> None:
    """A link to a device is no file."""
    folder = make(tmp_path / "out")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    assert check_manifest(folder) == ["config.json: missing"]


def test_forged_content_hash_is_told(tmp_path: Path) -> None:
    """The summary must follow from the list."""
    folder = make(tmp_path / "out")
    edit(folder, lambda manifest: manifest.update(content_sha256="0" * 64))
    assert check_manifest(folder) == ["manifest.json: content_sha256 does not follow from the files listed"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a manifest: file"),
        (b"{}", "not a manifest: key"),
        (b"[]", "not a manifest"),
        (b"\xff", "not a manifest"),
    ],
)
def test_broken_manifest_is_the_users_fault(tmp_path: Path, content: bytes, message: str) -> None:
    """One clear message, no traceback."""
    folder = make(tmp_path / "out")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        check_manifest(folder)


def test_absent_manifest_is_the_users_fault(tmp_path: Path) -> None:
    """Any folder may be asked about."""
    with pytest.raises(CheckpointError, match="no manifest can be read"):
        check_manifest(tmp_path)


def test_links_and_undecodable_names_are_not_shipped(tmp_path: Path) -> None:
    """What is written must be what others get: no links, and names that JSON can hold."""
    folder = make(tmp_path / "out")
    link = folder / "link"
    link.symlink_to(folder / "config.json")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        write_manifest(folder, key="k", source=FakeSource(), versions={}, seed=0)
    link.unlink()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).write_text("x")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        write_manifest(folder, key="k", source=FakeSource(), versions={}, seed=0)


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    """Hashing hundreds of gigabytes shows how far it is."""
    folder = make(tmp_path / "out")
    for run in (
        lambda progress: write_manifest(
            folder, key="k", source=FakeSource(), versions={}, seed=0, progress=progress
        ),
        lambda progress: check_manifest(folder, progress=progress),
    ):
        progress = Bytes()
        run(progress)
        assert progress.done == progress.total == 2 + 7000 + 3 + 4 + 4
