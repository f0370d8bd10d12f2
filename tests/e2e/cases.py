"""Recipes on tiny models for the end-to-end tests."""

from __future__ import annotations

import json
from pathlib import Path

from compressor.report.manifest import read_manifest


def write_recipe(path: Path, source: Path, weights: str, rest: str = "evaluate: null") -> Path:
    """A recipe file that compresses ``source``; ``weights`` and ``rest`` are YAML."""
    path.write_text(f"model: {{source: {json.dumps(str(source))}}}\nweights: {weights}\n{rest}\n")
    return path


def content(folder: Path) -> str:
    """The hash over everything in an output folder that no run's time is in."""
    return read_manifest(folder).content_sha256
