"""What the structure checks say of a folder."""

from __future__ import annotations

from pathlib import Path

from compressor.progress import Silent
from compressor.verify.structure import check_structure


def failed(folder: Path) -> dict[str, str]:
    """The details of the checks that failed."""
    found = check_structure(folder, Silent())
    return {check.name: check.detail for check in found if check.status == "failed"}


def statuses(folder: Path) -> dict[str, str]:
    """Check -> status."""
    return {check.name: check.status for check in check_structure(folder, Silent())}
