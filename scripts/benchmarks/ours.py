"""A calibrated run of this package, on a recipe that is written here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks.process import compress
from scripts.benchmarks.settings import RECIPE_SCHEMES

# Stages that a run also has but that no peer does: they are not part of quantizing and saving.
NOT_COUNTED = ("evaluate", "report")


def recipe_text(
    source: Path,
    scheme: str,
    solver: dict[str, Any],
    samples: int,
    length: int,
    texts: Sequence[str] = (),
) -> str:
    """A recipe (JSON is YAML) for one setting, on ``texts`` or the shipped calibration mixture.

    ``solver`` may hold a section ``polish`` beside its own options.
    """
    options = dict(solver)
    polish = {"polish": options.pop("polish")} if "polish" in options else {}
    datasets = {"datasets": [{"path": str(Path(text).absolute())} for text in texts]} if texts else {}
    recipe = {
        "model": {"source": str(source)},
        "weights": {
            "scheme": RECIPE_SCHEMES[scheme],
            "solver": options if len(options) > 1 else options["kind"],
            **polish,
        },
        "calibration": datasets | {"num_samples": samples, "sequence_length": length},
        "evaluate": None,
    }
    return json.dumps(recipe, indent=1) + "\n"


def run_ours(recipe: Path, target: Path, limit_s: float) -> dict[str, Any]:
    """One run into ``target``; its costs, with those of each stage.

    Raises:
        Failed: with what the program said.
        Late: it took longer than ``limit_s``.
    """
    workspace = target.with_suffix(".workspace")
    shutil.rmtree(workspace, ignore_errors=True)
    words = ["run", recipe, "--output", target, "--workspace", workspace, "--quiet"]
    found = compress(*words, limit_s=limit_s)
    stages = json.loads((target / "report.json").read_text())["stages"]
    counted = [stage for stage in stages if stage["name"] not in NOT_COUNTED]
    return {
        **{key: found[key] for key in ("wall_s", "cpu_s", "peak_rss_bytes")},
        "quantize_s": sum(stage["wall_s"] for stage in counted),
        "save_s": 0.0,
        "peak_device_bytes": max((stage.get("peak_device_bytes") or 0 for stage in stages), default=0),
        "stages": {stage["name"]: stage["wall_s"] for stage in stages},
    }


def walked_layers(target: Path) -> tuple[list[float], int]:
    """When each layer of a run into ``target`` was finished (seconds of the epoch), and weights quantized."""
    receipts = sorted(target.with_suffix(".workspace").rglob("layer-*.safetensors.json"))
    errors = [error for path in receipts for error in json.loads(path.read_text())["errors"]]
    return sorted(path.stat().st_mtime for path in receipts), sum(error["parameters"] for error in errors)


def heard_tokens(target: Path) -> Path | None:
    """The calibration tokens that a run left in its workspace; None where it needed none."""
    return next(target.with_suffix(".workspace").rglob("tokens.safetensors"), None)
