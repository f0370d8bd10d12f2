"""Tiny models that the tests of this folder share, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.checkpoint.folder import FolderSource

from .published import PUBLISHED
from .zoo import FAMILIES


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FolderSource]:
    """Opens the tiny model NAME or ``published NAME``; whoever changes its folder must copy it first."""
    root = tmp_path_factory.mktemp("families")

    def open_family(name: str) -> FolderSource:
        folder: Path = root / name
        if not folder.exists():
            make = PUBLISHED[name.removeprefix("published ")] if " " in name else FAMILIES[name]
            make(folder)
        return FolderSource(folder)

    return open_family
