"""What tests with the real engine need: its interpreter, and the plug-in for formats without a CPU kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compressor.verify.engine import PYTHON_VARIABLE, USUAL_PYTHON, find_engine_python

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = Path(__file__).resolve().parent / "plugin"


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The interpreter that ``COMPRESS_ENGINE_PYTHON`` names, or ``.venv-serve``; skips without one."""
    named = os.environ.get(PYTHON_VARIABLE)
    usual = ROOT / USUAL_PYTHON
    if not named and not usual.is_file():
        pytest.skip(f"no {USUAL_PYTHON}: make it with `bash scripts/serve_env.sh`")
    python = find_engine_python(Path(named) if named else usual)
    assert python is not None
    return python


@pytest.fixture(scope="session")
def plugin_env() -> dict[str, str]:
    """Variables that make vLLM load ``plugin/compressor_serve_emulation.py``."""
    return {"PYTHONPATH": str(PLUGIN)}


@pytest.fixture(scope="session")
def weight_only_env(plugin_env: dict[str, str]) -> dict[str, str]:
    """The same without rounded activations, so that weights can be compared to the last digit."""
    return plugin_env | {"COMPRESSOR_SERVE_WEIGHT_ONLY": "1"}
