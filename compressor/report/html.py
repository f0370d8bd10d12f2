"""A report as one self-contained page: no script, no external resource, every name escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from compressor.report import rows
from compressor.report.evaluated import (
    DOMAIN_HEADS,
    GENERATION_HEADS,
    SPEED_HEADS,
    domain_rows,
    gate_notes,
    generation_rows,
    speed_caption,
    speed_rows,
)
from compressor.report.html_sections import sections_of
from compressor.report.layer_plot import layer_drawings
from compressor.report.model import Quality, Report
from compressor.report.parts import PART_HEADS, PARTS, part_rows
from compressor.report.quality_plot import interval_drawing
from compressor.report.serve import request_command
from compressor.report.tiles import tiles
from compressor.report.words import percent, short_name, size, visible
from compressor.workspace import write_atomic

# The only addresses that the page links to; names from checkpoints never become links.
LINKS = {
    "vLLM": "https://docs.vllm.ai/",
    "compressed-tensors": "https://github.com/vllm-project/compressed-tensors",
    "modelopt": "https://github.com/NVIDIA/Model-Optimizer",
}
PAGE_FILE = "report.html"
# In the order of the page.
TITLES = {
    "worth": "Worth",
    "size": "Gained",
    "quality": "Lost",
    "budget": "Quality against size",
    "layers": "Layers",
    "context": "Context",
    "adapters": "Training on long documents",
    "calibration": "Calibration",
    "long": "Long context",
    "kv": "KV cache",
    "drafts": "Drafts",
    "cost": "Cost",
    "serve": "Serve",
    "verified": "Verified",
    "made": "Made with",
}
_BAR_WIDTH = 1000.0
_TONES = {
    **dict.fromkeys(("passed", "PASS"), " good"),
    **dict.fromkeys(("failed", "FAILED", "FAIL"), " bad"),
    **dict.fromkeys(("UNCERTAIN", "SUSPICIOUS"), " warn"),
}


def write_html(folder: Path, report: Report) -> None:
    """Writes report.html into the output folder."""
    write_atomic(folder / PAGE_FILE, render_html(report).encode())


def render_html(report: Report) -> str:
    """The page ``report.html``."""
    told = {
        **sections_of(report),
        **_gained(report),
        **_lost(report),
        **_layers(report),
        **_cost(report),
        **_verified(report),
    }
    absent = {name for name in TITLES if name in told and not told[name]}
    absent |= set() if told["layer_drawings"] or told["worst"] else {"layers"}
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            links=LINKS,
            titles=TITLES,
            sections=[(name, title) for name, title in TITLES.items() if name not in absent],
            headline=rows.headline(report).replace("->", "\u2192"),
            failed=any(not gate.passed for gate in report.gates),
            tiles=tiles(report),
            request=request_command(report.serve.model),
            **told,
        )
    )


def _gained(report: Report) -> dict[str, object]:
    """Sizes: by what is stored how, and by part."""
    before, after = rows.segments(report)
    largest = max(report.source.bytes, report.result.bytes, 1)
    parts = report.result.parts
    by_part = [
        tuple(
            rows.Segment(
                f"part{index}",
                name,
                sum(row.source_bytes if whole else row.bytes for row in parts if row.part == name),
            )
            for index, name in enumerate(PARTS)
            if any(row.part == name for row in parts)
        )
        for whole in (True, False)
    ]
    return {
        "kinds": [bar("before", before, largest), bar("after", after, largest)],
        "gained": rows.gained_rows(report),
        "part_heads": PART_HEADS,
        "parts": part_rows(parts),
        "part_bars": [bar(name, by, largest) for name, by in zip(("before", "after"), by_part, strict=True)],
        "schemes": rows.scheme_rows(report),
        "kept": rows.kept_rows(report),
        "size_caption": rows.size_caption(report),
    }


def _lost(report: Report) -> dict[str, object]:
    """Quality, and the limits that the recipe sets."""
    quality = report.quality
    return {
        "quality": [astuple(row) for row in rows.quality_rows(quality)] if quality else [],
        "quality_drawings": interval_drawing(report),
        "quality_tables": _evaluated(quality) if quality else [],
        "quality_notes": [speed_caption(quality.speed)] if quality and quality.speed else [],
        "quality_caption": rows.quality_caption(report),
        "command": quality.command if quality else "",
        "gate_heads": ("metric", "measured", "allowed", "verdict"),
        "gates": [rows.gate_row(gate) for gate in report.gates],
        "gate_notes": gate_notes(report.gates),
    }


def _evaluated(quality: Quality) -> list[tuple[str, tuple[str, ...], Sequence[tuple[str, ...]]]]:
    """(title, heads, rows) of what was measured beyond one figure for the whole text."""
    told: tuple[tuple[str, tuple[str, ...], Sequence[tuple[str, ...]]], ...] = (
        ("By domain", DOMAIN_HEADS, domain_rows(quality.domains)),
        ("Greedy continuations", GENERATION_HEADS, generation_rows(quality.generation)),
        ("Speed on this device", SPEED_HEADS, speed_rows(quality.speed)),
    )
    return [table for table in told if table[2]]


def _layers(report: Report) -> dict[str, object]:
    """Maps of layers and matrices, and the worst of them."""
    return {"layer_drawings": layer_drawings(report.weights.layers), "worst": rows.worst_rows(report)}


def _cost(report: Report) -> dict[str, object]:
    """Stages with bars: each figure's share of the largest of its column."""
    on_device = any(stage.peak_device_bytes for stage in report.stages)
    tops = [
        max((stage.wall_s for stage in report.stages), default=0.0),
        max((stage.peak_rss_bytes for stage in report.stages), default=0),
        max((stage.peak_device_bytes for stage in report.stages), default=0),
    ]
    texts = rows.stage_rows(report)
    stages = []
    for text, stage in zip(texts, report.stages, strict=False):
        shares = (stage.wall_s, stage.peak_rss_bytes, stage.peak_device_bytes)
        drawn = [f"{100 * value / top:.1f}" if top else None for value, top in zip(shares, tops, strict=True)]
        cells = list(zip(text[1:4], drawn, strict=True))[: 3 if on_device else 2]
        stages.append({"name": stage.name, "resumed": stage.resumed, "cells": cells})
    total = [(text, None) for text in texts[-1][1 : 4 if on_device else 3]]
    stages.append({"name": "all", "resumed": False, "cells": total})
    return {"stages": stages, "on_device": on_device}


def _verified(report: Report) -> dict[str, object]:
    """Whether the checkpoint is what it should be."""
    found = report.verification
    return {
        "checks": rows.check_rows(found) if found else [],
        "engine": rows.engine_rows(found.engine) if found else [],
        "verdict": rows.verdict(found) if found else rows.UNVERIFIED,
    }


def bar(title: str, segments: tuple[rows.Segment, ...], largest: int) -> dict[str, object]:
    """One stacked bar: rectangles on a scale where ``largest`` bytes are the full width."""
    total = sum(segment.bytes for segment in segments)
    parts, start = [], 0.0
    for segment in segments:
        width = _BAR_WIDTH * segment.bytes / largest
        share = percent(segment.bytes / total) if total else "-"
        parts.append(
            {
                "kind": segment.kind,
                "title": segment.title,
                "size": size(segment.bytes),
                "share": share,
                "x": f"{start:.2f}",
                "width": f"{width:.2f}",
            }
        )
        start += width
    return {"title": title, "total": size(total), "parts": parts}


@cache
def environment() -> Environment:
    """Templates of pages: everything is escaped but what a template calls safe."""
    made = Environment(
        loader=PackageLoader("compressor.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"visible": visible, "short": short_name, "size": size, "tone": _tone}
    return made


def _tone(cell: str) -> str:
    """The class of a verdict."""
    return _TONES.get(cell, "")
