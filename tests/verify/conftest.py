"""The model that the tests of the structure checks copy and break."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose widths suit every format."""
    return tiny_llama(
        tmp_path_factory.mktemp("dense") / "model", hidden=128, intermediate=256, heads=2, kv_heads=2
    )
