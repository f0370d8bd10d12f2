"""The output folder: it appears whole, by one rename, or not at all; nothing that is not ours is replaced."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.errors import CheckpointError, GateError, UserError
from compressor.report.card import write_card
from compressor.report.html import write_html
from compressor.report.manifest import MANIFEST_FILE, RUN_FILES, Manifest, read_manifest
from compressor.report.model import REPORT_FILE, Report
from compressor.stages.assemble import link_or_copy
from compressor.workspace import STAGE_FILE, Workspace, write_atomic

FAILED_SUFFIX = ".gate-failed"


def failed_folder(output: Path) -> Path:
    """Where a result goes that a gate refused."""
    return output.with_name(output.name + FAILED_SUFFIX)


def exported(folder: Path) -> Manifest | None:
    """The manifest of a finished export, or None where the folder is anything else.

    The manifest is written last; a folder with a file that it does not name, or without one that it names in
    its size, is not (or no longer) an export. The sizes of files that describe the run do not count: a
    verification writes these again, and may be killed in between.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return None
    try:
        manifest = read_manifest(folder)
        present = {
            path.relative_to(folder).as_posix(): path.lstat().st_size
            for path in folder.rglob("*")
            if not path.is_dir()
        }
    except (CheckpointError, OSError):
        return None
    del present[MANIFEST_FILE]
    named = {name: facts.size for name, facts in manifest.files.items()}
    if present.keys() != named.keys():
        return None
    same = all(present[name] == size for name, size in named.items() if name not in RUN_FILES)
    return manifest if same else None


def check_publishable(folder: Path) -> None:
    """Refuses to hand on what is no finished export, or what a gate has refused, whatever its folder's name.

    Raises:
        UserError: there is no finished result of this program in the folder.
        GateError: naming the gates.
    """
    manifest = exported(folder)
    if manifest is None:
        raise UserError("no finished result of this program", where=str(folder), fix="run the recipe first")
    if manifest.refused:
        raise GateError(f"{folder}: {'; '.join(manifest.refused)}")


def already_exported(folder: Path, recipe_yaml: str, key: str) -> bool:
    """Whether the folder is the finished export of this very recipe, source and evaluation text."""
    manifest = exported(folder)
    return (
        manifest is not None and manifest.key == key and (folder / "recipe.yaml").read_text() == recipe_yaml
    )


def refuse_foreign(folder: Path) -> None:
    """Raises UserError where the folder holds something that is not an export of this program."""
    if folder.is_dir() and any(folder.iterdir()) and exported(folder) is None:
        raise UserError(
            "the output folder is not empty, and what is in it is no result of this program",
            where=str(folder),
            fix="choose another --output, or move it away",
        )


def check_target(output: Path, recipe_yaml: str, key: str) -> None:
    """Refuses, before hours are spent, an output folder that the result could not go to.

    Raises:
        UserError: it cannot be made, or holds something else.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the output folder cannot be made: {error.strerror}",
            where=str(output),
            fix="choose another --output",
        ) from error
    refuse_foreign(output)
    if exported(output) is not None and not already_exported(output, recipe_yaml, key):
        raise UserError(
            "the output folder holds the result of another recipe, source or version",
            where=str(output),
            fix="choose another --output, or move it away",
        )


@contextmanager
def export_folder(space: Workspace, target: Path, checkpoint: Path) -> Iterator[Path]:
    """A folder with the checkpoint's files to add to; it becomes ``target`` when the block ends well.

    Built in the workspace with linked shards; where the target is on another file system, beside it.

    Raises:
        UserError: by then the target holds something that is not an export.
    """
    same_device = os.stat(target.parent).st_dev == os.stat(space.root).st_dev
    # A fixed name beside the target: what a killed run left there is met, and removed, by the next one.
    away = target.with_name(f".{target.name}.compress-partial")
    building = space.partials / f"export.tmp-{os.getpid()}" if same_device else away
    _remove(building)
    building.mkdir(parents=True)
    try:
        for file in sorted(checkpoint.iterdir()):
            _add(file, building)
        yield building
        refuse_foreign(target)
        _replace(target, building, space.partials / f"replaced.tmp-{os.getpid()}")
    except BaseException:
        _remove(building)
        raise


def describe(folder: Path, report: Report, recipe_yaml: str) -> None:
    """Writes the resolved recipe, report.json, report.html and the model card into ``folder``."""
    write_atomic(folder / "recipe.yaml", recipe_yaml.encode())
    write_atomic(folder / REPORT_FILE, report.to_json().encode())
    write_html(folder, report)
    write_card(folder, report)


def _add(file: Path, folder: Path) -> None:
    """Shards are linked; small files are copied, so that an edit of the export stays in the export."""
    if file.name == STAGE_FILE:
        return
    if file.is_dir():
        (folder / file.name).mkdir()
        for inner in sorted(file.iterdir()):
            _add(inner, folder / file.name)
    elif file.suffix == ".safetensors":
        link_or_copy(file, folder / file.name)
    else:
        shutil.copyfile(file, folder / file.name)


def _replace(target: Path, building: Path, aside: Path) -> None:
    """``building`` becomes ``target``; an older export steps aside first and is removed last."""
    if not target.is_dir() or not any(target.iterdir()):
        try:
            building.rename(target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            _fill(target, building)
        return
    if os.stat(target).st_dev != os.stat(aside.parent).st_dev:
        aside = target.with_name(f".{target.name}.compress-replaced")
        _remove(aside)
    target.rename(aside)
    building.rename(target)
    _remove(aside)


def _fill(mount_point: Path, building: Path) -> None:
    """A mount point cannot be renamed over: its files are moved in one by one, the manifest last."""
    files = sorted(building.iterdir(), key=lambda file: file.name == MANIFEST_FILE)
    for file in files:
        shutil.move(file, mount_point / file.name)
    building.rmdir()


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
