"""The sections of a report's page that only some runs have: what each hands to its part of the template."""

from __future__ import annotations

from compressor.report import calibration_rows
from compressor.report.adapters import (
    ADAPTER_HEADS,
    AdapterFacts,
    adapter_caption,
    adapter_notes,
    adapter_rows,
)
from compressor.report.budget import BudgetFacts
from compressor.report.budget_rows import CHOICE_HEADS, MIX_HEADS, budget_caption, choice_rows, mix_rows
from compressor.report.compounding import (
    CLAIM_HEADS,
    COMPOUNDING_HEADS,
    CompoundingFacts,
    cell_number,
    claim_rows,
    compounding_caption,
    ledger_heads,
    ledger_rows,
    times,
)
from compressor.report.context import (
    CONTEXT_COST_HEADS,
    CONTEXT_HEADS,
    SEARCH_HEADS,
    ContextFacts,
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
from compressor.report.drawing import Drawing
from compressor.report.experts import EXPERT_HEADS, expert_rows
from compressor.report.kv import (
    KV_HEADS,
    KV_QUALITY_HEADS,
    KvFacts,
    kv_caption,
    kv_notes,
    kv_quality_rows,
    kv_rows,
)
from compressor.report.layer_plot import expert_drawing, kv_drawings
from compressor.report.ledger_plot import ledger_drawing
from compressor.report.long import LongFacts, long_caption, long_tables, places
from compressor.report.model import Report
from compressor.report.quality_plot import frontier_drawing, sensitivity_drawing


def sections_of(report: Report) -> dict[str, object]:
    """Variables of the template; a section's own name is false where the run has no such section."""
    return {
        **_worth(report.compounding),
        **_budget(report.budget),
        **_context(report.context),
        **_adapters(report.adapters),
        **_calibration(report),
        **_long(report.long),
        **_kv(report.kv),
        **_drafts(report.drafts),
    }


def _worth(facts: CompoundingFacts | None) -> dict[str, object]:
    """What the result is worth to who serves it."""
    if facts is None:
        return {"worth": False}
    rated = [
        (
            row.title,
            [(cell_number(row.unit, cell), cell.mark) for cell in (row.baseline, row.optimized)],
            times(row.gain),
        )
        for row in facts.rows
    ]
    ledgers = [ledger for ledger in facts.ledgers if ledger.steps]
    return {
        "worth": True,
        "worth_heads": COMPOUNDING_HEADS,
        "worth_rows": rated,
        "ledgers": [(ledger.title, ledger_heads(ledger), ledger_rows(ledger)) for ledger in ledgers],
        "ledger_drawings": [drawing for ledger in ledgers for drawing in ledger_drawing(ledger)],
        "claim_heads": CLAIM_HEADS,
        "claims": claim_rows(facts),
        "worth_notes": facts.notes,
        "worth_caption": compounding_caption(facts),
    }


def _budget(facts: BudgetFacts | None) -> dict[str, object]:
    """How schemes were chosen."""
    if facts is None:
        return {"budget": False}
    return {
        "budget": True,
        "budget_drawings": [*frontier_drawing(facts), *sensitivity_drawing(facts)],
        "mix_heads": MIX_HEADS,
        "mixes": mix_rows(facts),
        "choice_heads": CHOICE_HEADS,
        "choices": choice_rows(facts),
        "budget_caption": budget_caption(facts),
    }


def _context(facts: ContextFacts | None) -> dict[str, object]:
    """How positions are scaled."""
    if facts is None:
        return {"context": False}
    return {
        "context": True,
        "context_caption": context_caption(facts),
        "context_heads": CONTEXT_HEADS,
        "context_rows": context_rows(facts),
        "context_cost_heads": CONTEXT_COST_HEADS,
        "context_costs": context_cost_rows(facts),
        "search_heads": SEARCH_HEADS,
        "search_rows": search_rows(facts),
        "context_notes": context_notes(facts),
    }


def _adapters(facts: AdapterFacts | None) -> dict[str, object]:
    """What was trained on long documents."""
    if facts is None:
        return {"adapters": False}
    from compressor.report.training_plot import adapter_svg

    return {
        "adapters": True,
        "adapter_drawings": _drawn(adapter_svg(facts)),
        "adapter_caption": adapter_caption(facts),
        "adapter_heads": ADAPTER_HEADS,
        "adapter_rows": adapter_rows(facts),
        "adapter_notes": adapter_notes(facts),
    }


def _calibration(report: Report) -> dict[str, object]:
    """What solvers were shown, and what it did."""
    facts = report.calibration
    if facts is None:
        return {"calibration": ""}
    experts = expert_drawing(facts)
    return {
        "calibration": calibration_rows.calibration_caption(report),
        "solver_heads": calibration_rows.SOLVER_HEADS,
        "solvers": calibration_rows.solver_rows(facts),
        "worst_output_heads": calibration_rows.WORST_OUTPUT_HEADS,
        "worst_outputs": calibration_rows.worst_output_rows(facts),
        "expert_heads": EXPERT_HEADS,
        "experts": expert_rows(facts),
        "expert_drawings": [experts] if experts else [],
        "calibration_notes": calibration_rows.calibration_notes(facts),
    }


def _long(facts: LongFacts | None) -> dict[str, object]:
    """Long context: its tables, and drawings, which are slow to make."""
    if facts is None:
        return {"long": False}
    from compressor.report.long_plot import found_svg, nll_svg

    kinds = dict.fromkeys(kind for kind, _ in places(facts))
    return {
        "long": True,
        "long_tables": long_tables(facts),
        "long_plots": _drawn(nll_svg(facts), *(found_svg(facts, kind) for kind in kinds)),
        "long_caption": long_caption(facts),
    }


def _kv(facts: KvFacts | None) -> dict[str, object]:
    """How the cache is stored."""
    if facts is None:
        return {"kv": False}
    return {
        "kv": True,
        "kv_drawings": kv_drawings(facts),
        "kv_caption": kv_caption(facts),
        "kv_heads": KV_HEADS,
        "kv_rows": kv_rows(facts),
        "kv_quality_heads": KV_QUALITY_HEADS,
        "kv_quality": kv_quality_rows(facts),
        "kv_notes": kv_notes(facts),
    }


def _drafts(facts: DraftFacts | None) -> dict[str, object]:
    """What proposes tokens: its tables, and a drawing of its training."""
    if facts is None:
        return {"drafts": False}
    from compressor.report.training_plot import draft_svg

    return {
        "drafts": True,
        "draft_heads": DRAFT_HEADS,
        "draft_rows": draft_rows(facts),
        "decoded_heads": DECODING_HEADS,
        "decoded_rows": decoded_rows(facts),
        "held_out_heads": HELD_OUT_HEADS,
        "held_out_rows": held_out_rows(facts),
        "draft_drawings": _drawn(draft_svg(facts)),
        "draft_notes": draft_notes(facts),
        "draft_caption": draft_caption(facts),
    }


def _drawn(*elements: str) -> list[Drawing]:
    """Drawings whose titles are on them; of numbers, no name of a stranger is in them."""
    return [Drawing("", element, "") for element in elements if element]
