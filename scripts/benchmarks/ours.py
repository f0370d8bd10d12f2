"""A calibrated run of this package, on a recipe that is written here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from scripts.benchmarks.process import compress
from scripts.benchmarks.settings import RECIPE_SCHEMES

# Stages that a run also has but that no peer does: they are not part of quantizing and saving.
NOT_COUNTED = ("evaluate", "report")


def recipe_text(source: Path, scheme: str, solver: dict[str, Any], samples: int, length: int) -> str:
    """A recipe (JSON is YAML) for one setting, on the shipped calibration mixture."""
    recipe = {
        "model": {"source": str(source)},
        "weights": {"scheme": RECIPE_SCHEMES[scheme], "solver": solver},
        "calibration": {"num_samples": samples, "sequence_length": length},
        "evaluate": None,
    }
    return json.dumps(recipe, indent=1) + "\n"


def run_ours(recipe: Path, target: Path) -> dict[str, Any]:
    """One run into ``target``; its costs, with those of each stage.

    Raises:
        Failed: with what the program said.
    """
    workspace = target.with_suffix(".workspace")
    shutil.rmtree(workspace, ignore_errors=True)
    found = compress("run", recipe, "--output", target, "--workspace", workspace, "--quiet")
    stages = json.loads((target / "report.json").read_text())["stages"]
    counted = [stage for stage in stages if stage["name"] not in NOT_COUNTED]
    return {
        **{key: found[key] for key in ("wall_s", "cpu_s", "peak_rss_bytes")},
        "quantize_s": sum(stage["wall_s"] for stage in counted),
        "save_s": 0.0,
        "peak_device_bytes": max((stage.get("peak_device_bytes") or 0 for stage in stages), default=0),
        "stages": {stage["name"]: stage["wall_s"] for stage in stages},
    }


def heard_tokens(target: Path) -> Path | None:
    """The calibration tokens that a run left in its workspace; None where it needed none."""
    return next(target.with_suffix(".workspace").rglob("tokens.safetensors"), None)
