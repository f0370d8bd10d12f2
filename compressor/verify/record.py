"""Writes what a verification found into the folder's report, page, card and manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from compressor.errors import CheckpointError
from compressor.export import describe
from compressor.progress import Progress
from compressor.report.manifest import MANIFEST_FILE, RUN_FILES, FileFacts, Manifest, read_manifest
from compressor.report.model import REPORT_FILE, Report, load_report
from compressor.report.verification import Verification
from compressor.verify.inputs import RECIPE_FILE
from compressor.workspace import write_json


def record(folder: Path, found: Verification, progress: Progress) -> Report | None:
    """The folder's report with ``found`` in it, or None where nothing was written.

    Only an export of this program is written to. Files that are links (a Hub cache) are left alone.
    """
    files = [folder / name for name in (*RUN_FILES, RECIPE_FILE)]
    if not (folder / REPORT_FILE).exists():
        return None
    odd = [file.name for file in files if file.is_symlink() or not file.is_file()]
    if odd:
        progress.warn(f"the result is not recorded in {folder}: {odd[0]} is missing, or a link")
        return None
    if any(check.name == "manifest" and check.status == "failed" for check in found.checks):
        # Hashing what is there would make the edited files look exported.
        progress.warn(f"the result is not recorded in {folder}: its files are not those that were exported")
        return None
    try:
        report = load_report(folder).model_copy(update={"verification": found})
        manifest = read_manifest(folder)
        describe(folder, report, (folder / RECIPE_FILE).read_text(encoding="utf-8"))
        write_json(folder / MANIFEST_FILE, _described_again(folder, manifest).model_dump())
    except (CheckpointError, OSError, UnicodeDecodeError) as error:  # no report of ours; read-only, full
        reason = error.what if isinstance(error, CheckpointError) else str(error)
        progress.warn(f"the result is not recorded in {folder}: {reason}")
        return None
    return report


def _described_again(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the files that describe the run as they are now; all others as they were."""
    changed = {}
    for name in RUN_FILES - {MANIFEST_FILE}:
        content = (folder / name).read_bytes()
        changed[name] = FileFacts(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    return manifest.model_copy(update={"files": {**manifest.files, **changed}})
