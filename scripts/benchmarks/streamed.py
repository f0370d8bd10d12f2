"""Runs of this package on a source that may be larger than memory, against what their plans say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.benchmarks.process import ROOT, compress

# The published checkpoint that a synthetic one stands for.
SCOUT = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
SCOUT_HEADERS = ROOT / "recipes" / "configs" / "llama-4-scout"
_PLANNED = ("peak_rss_bytes", "disk_bytes", "time_s")


def our_maker(source: Path, search: str) -> Callable[[Path], dict[str, Any]]:
    """A function that compresses ``source`` to NVFP4A16 with this search into the folder that it is given."""
    return maker(source, stream_recipe(search))


def stream_recipe(search: str) -> str:
    """All of a recipe but ``model``, for a run that needs no data."""
    return f"weights: {{scheme: nvfp4a16, solver: {{kind: rtn, search: {search}}}}}\nevaluate: null\n"


def walk_recipe(search: str, samples: int, length: int, gigabytes: float) -> str:
    """The same for one that hears activation ranges, within so much memory."""
    return (
        f"weights: {{scheme: nvfp4, solver: {{kind: rtn, search: {search}}}}}\nevaluate: null\n"
        f"calibration: {{num_samples: {samples}, sequence_length: {length}}}\n"
        f"workspace: {{max_memory_bytes: {int(gigabytes * 1e9)}}}\n"
    )


def maker(source: Path, recipe_text: str) -> Callable[[Path], dict[str, Any]]:
    """A function that runs a recipe on ``source`` into the folder that it is given."""

    def make(target: Path) -> dict[str, Any]:
        recipe = target.with_suffix(".yaml")
        recipe.write_text(f"model: {{source: {json.dumps(str(source))}}}\n{recipe_text}")
        workspace = target.with_suffix(".workspace")
        shutil.rmtree(workspace, ignore_errors=True)
        places = ("--output", str(target), "--workspace", str(workspace))
        predicted = planned(recipe, *places)
        found = compress("run", str(recipe), *places, "--quiet", folders=(target, workspace))
        stages = json.loads((target / "report.json").read_text())["stages"]
        weights = [stage for stage in stages if stage["name"] in ("walk", "stream")]
        return found | {
            "quantize_s": sum(s["wall_s"] for s in stages if s["name"] in ("walk", "stream", "assemble")),
            "stream_rss_bytes": max(stage["peak_rss_bytes"] for stage in weights),
            "predicted": predicted,
            "stages": stages,
        }

    return make


def planned(recipe: Path, *more: str) -> dict[str, float]:
    """What the plan of a recipe says it will take."""
    told = json.loads(compress("plan", str(recipe), *more, "--json")["stdout"])
    return {name: told[name] for name in _PLANNED} | {"source_bytes": told["source_bytes"]}


def for_scout(work: Path, recipe_text: str, bytes_per_s: float) -> dict[str, float]:
    """What a recipe takes of all of Llama-4-Scout: hours at this rate, and what its plan says of the rest."""
    recipe = work / "whole-scout.yaml"
    headers = json.dumps(str(SCOUT_HEADERS))
    recipe.write_text(f"model: {{source: {SCOUT}, headers: {headers}}}\n{recipe_text}")
    whole = planned(recipe, "--output", str(work / "whole-scout"))
    return whole | {"hours": whole["source_bytes"] / bytes_per_s / 3600}
