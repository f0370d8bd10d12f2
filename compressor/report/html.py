"""A report as one self-contained page: no script, no external resource, every name escaped."""

from __future__ import annotations

from dataclasses import astuple
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from compressor.report import rows
from compressor.report.adapters import ADAPTER_HEADS, adapter_caption, adapter_notes, adapter_rows
from compressor.report.context import (
    CONTEXT_COST_HEADS,
    CONTEXT_HEADS,
    SEARCH_HEADS,
    context_caption,
    context_cost_rows,
    context_notes,
    context_rows,
    search_rows,
)
from compressor.report.decoding import DECODING_HEADS
from compressor.report.drafts import (
    DRAFT_HEADS,
    HELD_OUT_HEADS,
    DraftFacts,
    decoded_rows,
    draft_caption,
    draft_notes,
    draft_rows,
    held_out_rows,
)
from compressor.report.experts import EXPERT_HEADS, expert_rows
from compressor.report.kv import KV_HEADS, KV_QUALITY_HEADS, kv_caption, kv_notes, kv_quality_rows, kv_rows
from compressor.report.long import LongFacts, long_caption, long_tables, places
from compressor.report.model import Report
from compressor.report.serve import request_command
from compressor.report.words import percent, short_name, size, visible
from compressor.workspace import write_atomic

# The only addresses that the page links to; names from checkpoints never become links.
LINKS = {
    "vLLM": "https://docs.vllm.ai/",
    "compressed-tensors": "https://github.com/vllm-project/compressed-tensors",
    "modelopt": "https://github.com/NVIDIA/Model-Optimizer",
}
PAGE_FILE = "report.html"
_BAR_WIDTH = 1000.0


def write_html(folder: Path, report: Report) -> None:
    """Writes report.html into the output folder."""
    write_atomic(folder / PAGE_FILE, render_html(report).encode())


def render_html(report: Report) -> str:
    """The page ``report.html``."""
    quality, found, facts = report.quality, report.verification, report.calibration
    before, after = rows.segments(report)
    largest = max(report.source.bytes, report.result.bytes, 1)
    return _template().render(
        report=report,
        links=LINKS,
        headline=rows.headline(report).replace("->", "\u2192"),
        bars=[_bar("before", before, largest), _bar("after", after, largest)],
        gained=rows.gained_rows(report),
        schemes=rows.scheme_rows(report),
        worst=rows.worst_rows(report),
        kept=rows.kept_rows(report),
        size_caption=rows.size_caption(report),
        quality=[astuple(row) for row in rows.quality_rows(quality)] if quality else [],
        quality_caption=rows.quality_caption(report),
        command=quality.command if quality else "",
        gates=[rows.gate_row(gate) for gate in report.gates],
        failed=any(not gate.passed for gate in report.gates),
        calibration=rows.calibration_caption(report),
        solver_heads=rows.SOLVER_HEADS,
        solvers=rows.solver_rows(facts) if facts else [],
        worst_output_heads=rows.WORST_OUTPUT_HEADS,
        worst_outputs=rows.worst_output_rows(facts) if facts else [],
        expert_heads=EXPERT_HEADS,
        experts=expert_rows(facts) if facts else [],
        calibration_notes=rows.calibration_notes(facts) if facts else [],
        context=report.context is not None,
        context_caption=context_caption(report.context) if report.context else "",
        context_heads=CONTEXT_HEADS,
        context_rows=context_rows(report.context) if report.context else [],
        context_cost_heads=CONTEXT_COST_HEADS,
        context_costs=context_cost_rows(report.context) if report.context else [],
        search_heads=SEARCH_HEADS,
        search_rows=search_rows(report.context) if report.context else [],
        context_notes=context_notes(report.context) if report.context else [],
        **_long(report.long),
        adapters=report.adapters is not None,
        adapter_caption=adapter_caption(report.adapters) if report.adapters else "",
        adapter_heads=ADAPTER_HEADS,
        adapter_rows=adapter_rows(report.adapters) if report.adapters else [],
        adapter_notes=adapter_notes(report.adapters) if report.adapters else [],
        kv=report.kv is not None,
        kv_caption=kv_caption(report.kv) if report.kv else "",
        kv_heads=KV_HEADS,
        kv_rows=kv_rows(report.kv) if report.kv else [],
        kv_quality_heads=KV_QUALITY_HEADS,
        kv_quality=kv_quality_rows(report.kv) if report.kv else [],
        kv_notes=kv_notes(report.kv) if report.kv else [],
        **_drafts(report.drafts),
        stages=rows.stage_rows(report),
        checks=rows.check_rows(found) if found else [],
        engine=rows.engine_rows(found.engine) if found else [],
        verdict=rows.verdict(found) if found else rows.UNVERIFIED,
        request=request_command(report.serve.model),
    )


def _long(facts: LongFacts | None) -> dict[str, object]:
    """Long context: its tables, and drawings, which are slow to make."""
    if facts is None:
        return {"long": False}
    from compressor.report.long_plot import found_svg, nll_svg

    kinds = dict.fromkeys(kind for kind, _ in places(facts))
    drawn = [nll_svg(facts), *(found_svg(facts, kind) for kind in kinds)]
    return {
        "long": True,
        "long_tables": long_tables(facts),
        "long_plots": [Markup(svg) for svg in drawn if svg],  # of numbers: no name of a stranger is in it
        "long_caption": long_caption(facts),
    }


def _drafts(facts: DraftFacts | None) -> dict[str, object]:
    """What proposes tokens: its tables, and a drawing of its training."""
    if facts is None:
        return {"drafts": False}
    from compressor.report.draft_plot import training_svg

    return {
        "drafts": True,
        "draft_heads": DRAFT_HEADS,
        "draft_rows": draft_rows(facts),
        "decoded_heads": DECODING_HEADS,
        "decoded_rows": decoded_rows(facts),
        "held_out_heads": HELD_OUT_HEADS,
        "held_out_rows": held_out_rows(facts),
        "draft_plot": Markup(training_svg(facts)),  # of numbers: no name of a stranger is in it
        "draft_notes": draft_notes(facts),
        "draft_caption": draft_caption(facts),
    }


def _bar(title: str, segments: tuple[rows.Segment, ...], largest: int) -> dict[str, object]:
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
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("compressor.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "short": short_name, "size": size}
    return environment.get_template("report.html.j2")
