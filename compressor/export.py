"""The output folder: it appears whole, by one rename, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.errors import CheckpointError, UserError
from compressor.report.card import write_card
from compressor.report.html import write_html
from compressor.report.manifest import MANIFEST_FILE, read_manifest
from compressor.report.model import REPORT_FILE, Report
from compressor.stages.assemble import link_or_copy
from compressor.workspace import STAGE_FILE, Workspace, write_atomic

FAILED_SUFFIX = ".gate-failed"


def failed_folder(output: Path) -> Path:
    """Where a result goes that a gate refused."""
    return output.with_name(output.name + FAILED_SUFFIX)


def already_exported(folder: Path, recipe_yaml: str, fingerprint: str) -> bool:
    """Whether the folder is the finished export of this very recipe and source.

    The manifest is the last file of an export, so its presence says that the folder is whole.
    """
    if not (folder / MANIFEST_FILE).is_file() or not (folder / REPORT_FILE).is_file():
        return False
    try:
        same_source = read_manifest(folder).source.fingerprint == fingerprint
        return same_source and (folder / "recipe.yaml").read_text() == recipe_yaml
    except (CheckpointError, OSError):
        return False


@contextmanager
def export_folder(space: Workspace, target: Path, checkpoint: Path) -> Iterator[Path]:
    """A folder with the checkpoint's files to add to; it is renamed to ``target`` when the block ends well.

    Built in the workspace; where that is another file system, it is copied beside the target first.
    """
    building = space.partials / f"export.tmp-{os.getpid()}"
    building.mkdir(parents=True)
    for file in sorted(checkpoint.iterdir()):
        if file.name != STAGE_FILE:
            link_or_copy(file, building / file.name)
    yield building
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        if any(target.iterdir()) and not (target / MANIFEST_FILE).is_file():
            raise UserError(
                "the folder is not empty and holds no result", where=str(target), fix="move it away"
            )
        shutil.rmtree(target)
    try:
        building.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        shutil.copytree(building, beside)
        beside.rename(target)
        shutil.rmtree(building)


def describe(folder: Path, report: Report, recipe_yaml: str) -> None:
    """Writes the resolved recipe, report.json, report.html and the model card into ``folder``."""
    write_atomic(folder / "recipe.yaml", recipe_yaml.encode())
    write_atomic(folder / REPORT_FILE, report.to_json().encode())
    write_html(folder, report)
    write_card(folder, report)
