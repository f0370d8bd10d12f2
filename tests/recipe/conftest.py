"""Recipe files made on the spot, and the faults that loading them gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from compressor.recipe.faults import RecipeFaults
from compressor.recipe.load import load_recipe

Write = Callable[..., Path]
Faults = Callable[..., list[tuple[str, str]]]

SMALL = """\
schema_version: 1
model: {source: some/model}
weights: {scheme: nvfp4a16}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes recipe text below a folder that is also the current one."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


@pytest.fixture
def faults(write: Write) -> Faults:
    """(where, message with its mend) of every fault of a recipe text."""

    def load(text: str, overrides: Sequence[str] = ()) -> list[tuple[str, str]]:
        path = write(text)
        with pytest.raises(RecipeFaults) as caught:
            load_recipe(str(path), overrides)
        return [(fault.where, f"{fault.what} -> {fault.fix}") for fault in caught.value.faults]

    return load
