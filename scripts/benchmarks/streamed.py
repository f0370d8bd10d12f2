"""A run of this package that needs no data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.benchmarks.process import compress


def our_maker(source: Path, search: str) -> Callable[[Path], dict[str, Any]]:
    """A function that compresses ``source`` to NVFP4A16 with this search into the folder that it is given."""

    def make(target: Path) -> dict[str, Any]:
        recipe = target.with_suffix(".yaml")
        recipe.write_text(
            f"model: {{source: {json.dumps(str(source))}}}\n"
            f"weights: {{scheme: nvfp4a16, solver: {{kind: rtn, search: {search}}}}}\n"
            "evaluate: null\n"
        )
        workspace = target.with_suffix(".workspace")
        shutil.rmtree(workspace, ignore_errors=True)
        found = compress(
            "run", str(recipe), "--output", str(target), "--workspace", str(workspace), "--quiet"
        )
        stages = json.loads((target / "report.json").read_text())["stages"]
        streamed = next(stage for stage in stages if stage["name"] == "stream")
        return found | {
            "quantize_s": sum(s["wall_s"] for s in stages if s["name"] in ("stream", "assemble")),
            "stream_rss_bytes": streamed["peak_rss_bytes"],
        }

    return make
