"""The workspace: keys, one-rename publishing, the lock, sweeping."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from compressor.errors import UserError
from compressor.workspace import Workspace, file_sha256, stage_key, write_atomic


def test_key_depends_on_everything_it_is_told() -> None:
    """Any difference in name, version, spec or needs gives another key; order of spec keys does not."""
    base = stage_key("stream", 1, {"a": 1, "b": 2}, ["x"])
    assert base == stage_key("stream", 1, {"b": 2, "a": 1}, ["x"])
    others = {
        stage_key("walk", 1, {"a": 1, "b": 2}, ["x"]),
        stage_key("stream", 2, {"a": 1, "b": 2}, ["x"]),
        stage_key("stream", 1, {"a": 1, "b": 3}, ["x"]),
        stage_key("stream", 1, {"a": 1, "b": 2}, ["y"]),
    }
    assert len(others | {base}) == 5


def test_publish_is_the_only_way_to_be_finished(tmp_path: Path) -> None:
    """A stage under way is not finished, keeps its files over a restart, and is finished once published."""
    space = Workspace(tmp_path)
    with space.locked():
        folder = space.begin("stream", "k")
        (folder / "piece").write_text("1")
        assert not space.finished("stream", "k")
    again = Workspace(tmp_path)
    with again.locked():
        assert (again.begin("stream", "k") / "piece").read_text() == "1"
        again.publish("stream", "k", {"n": 3})
        assert again.finished("stream", "k")
        assert again.facts("stream", "k") == {"n": 3}
        again.discard("stream", "k")
        assert not again.finished("stream", "k")


def test_leftovers_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    """Temporary files and folders go when the lock is taken; finished pieces stay."""
    space = Workspace(tmp_path)
    folder = space.begin("stream", "k")
    (folder / "shard.tmp-123").write_text("half")
    (folder / "shard").write_text("whole")
    (space.partials / "export.tmp-9").mkdir()
    blobs = space.hub / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_text("whole")
    (blobs / "abc.01234567.incomplete").write_text("half")
    with space.locked():
        assert [path.name for path in blobs.iterdir()] == ["abc"]
        assert sorted(path.name for path in folder.iterdir()) == ["shard"]
        assert not (space.partials / "export.tmp-9").exists()


def _hold(root: Path, held: Event, leave: Event) -> None:
    with Workspace(root).locked():
        held.set()
        leave.wait(30)
        os._exit(9)  # dies holding the lock, as with SIGKILL


def test_lock_keeps_a_second_run_out_and_dies_with_its_holder(tmp_path: Path) -> None:
    """Another process is refused with the holder's number; a dead holder's lock is free."""
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, held, leave))
    holder.start()
    assert held.wait(60)
    with pytest.raises(UserError, match=f"process {holder.pid}"), Workspace(tmp_path).locked():
        pass
    leave.set()
    holder.join(60)
    with Workspace(tmp_path).locked():
        pass


def test_unwritable_workspace_is_one_message(tmp_path: Path) -> None:
    """A workspace path that runs through a file is the user's fault, said plainly."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), Workspace(tmp_path / "file" / "w").locked():
        pass


def test_entries_are_listed_largest_first(tmp_path: Path) -> None:
    """``compress clean`` sees finished and interrupted stages with their sizes."""
    space = Workspace(tmp_path)
    (space.begin("a", "1") / "x").write_bytes(b"0" * 10)
    (space.begin("b", "2") / "x").write_bytes(b"0" * 5000)
    space.publish("b", "2", {})
    sizes = [(entry.path.name, entry.finished) for entry in space.entries()]
    assert sizes == [("b-2", True), ("a-1", False)]


def test_entries_hold_draft_models(tmp_path: Path) -> None:
    """Each with all that was made of it; without a result it was interrupted."""
    space = Workspace(tmp_path)
    for name, folder, size in (("one", "result", 3000), ("one", "workspace", 100), ("two", "workspace", 20)):
        place = space.drafts / name / folder
        place.mkdir(parents=True)
        (place / "x").write_bytes(b"0" * size)
    found = [(entry.path.name, entry.finished, entry.nbytes) for entry in space.entries()]
    assert found == [("one", True, 3100), ("two", False, 20)]


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    """The target holds the new bytes, no temporary file stays, and the hash is of these bytes."""
    path = tmp_path / "f"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert [item.name for item in tmp_path.iterdir()] == ["f"]
    assert file_sha256(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"
