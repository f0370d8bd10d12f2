"""The model card: the README.md of the output folder, as the Hub reads it.

Markdown has no safe subset, so every string that comes from a checkpoint or a recipe passes ``escape``
(text) or ``fenced`` (blocks); the front matter is dumped by YAML and holds only strings that match a strict
pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from compressor.report import calibration_rows, rows
from compressor.report.adapters import (
    ADAPTER_HEADS,
    AdapterFacts,
    adapter_caption,
    adapter_notes,
    adapter_rows,
)
from compressor.report.budget import BudgetFacts
from compressor.report.budget_rows import CHOICE_HEADS, MIX_HEADS, budget_caption, choice_rows, mix_rows
from compressor.report.calibration import CalibrationFacts
from compressor.report.compounding import (
    CLAIM_HEADS,
    COMPOUNDING_HEADS,
    CompoundingFacts,
    claim_rows,
    compounding_caption,
    compounding_rows,
    ledger_heads,
    ledger_rows,
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
from compressor.report.kv import (
    KV_HEADS,
    KV_QUALITY_HEADS,
    KvFacts,
    kv_caption,
    kv_notes,
    kv_quality_rows,
    kv_rows,
)
from compressor.report.long import LongFacts, long_caption, long_tables
from compressor.report.measured import Evaluated
from compressor.report.model import Report
from compressor.report.parts import PART_HEADS, part_rows
from compressor.report.serve import request_command
from compressor.report.tiles import TILE_HEADS, tiles
from compressor.report.words import short_name, size, visible
from compressor.workspace import write_atomic

CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_TAG = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
# What starts a construct of CommonMark or of the Hub's extensions inside a line; a colon only before a
# non-space, where it could make an address or an emoji.
_SPECIAL = re.compile(r"([\\`*_\[\]<#|~&$@]|:(?=\S))")
_BARE_LINK = re.compile(r"(?i)\b(www)\.")


def write_card(folder: Path, report: Report) -> None:
    """Writes README.md into the output folder, whose ``recipe.yaml`` it quotes."""
    recipe_yaml = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    write_atomic(folder / CARD_FILE, render_card(report, recipe_yaml).encode())


def render_card(report: Report, recipe_yaml: str) -> str:
    """The model card of a result made with the recipe ``recipe_yaml`` (the resolved one)."""
    sections = [
        f"# {escape(short_name(report.name))}\n\n{escape(rows.headline(report))}.",
        _glance(report),
        _overview(report),
        _done(report),
        *([_budget(report.budget)] if report.budget else []),
        *([_context(report.context)] if report.context else []),
        *([_adapters(report.adapters)] if report.adapters else []),
        *([_calibration(report, report.calibration)] if report.calibration else []),
        *([_long(report.long)] if report.long else []),
        *([_kv(report.kv)] if report.kv else []),
        *([_drafts(report.drafts)] if report.drafts else []),
        *([_compounding(report.compounding)] if report.compounding else []),
        _serving(report),
        _verified(report),
        _evaluation(report),
        _limits(report),
        _making(report, recipe_yaml),
    ]
    return f"---\n{_front_matter(report)}---\n\n" + "\n\n".join(sections) + "\n"


def escape(text: str) -> str:
    """``text`` as one line of Markdown that shows exactly it: no markup, no HTML, no link, no new cell."""
    return _BARE_LINK.sub(r"\1\\.", _SPECIAL.sub(r"\\\1", visible(text.strip())))


def fenced(text: str, language: str = "") -> str:
    """``text`` in a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    lines = [visible(line) for line in text.rstrip("\n").split("\n")]
    return "\n".join([f"{fence}{language}", *lines, fence])


def _front_matter(report: Report) -> str:
    source = report.source
    facts: dict[str, object] = {}
    if source.base_model and _REPOSITORY.fullmatch(source.base_model):
        relation = "quantized" if report.result.schemes else "finetune"
        facts |= {"base_model": source.base_model, "base_model_relation": relation}
    if source.license and _LICENSE.fullmatch(source.license):
        facts["license"] = source.license
    labels = (label.lower().replace(" ", "-") for label in report.result.schemes)
    tags = [report.result.format, "quantized"] if report.result.schemes else []
    tags += [label for label in labels if _TAG.fullmatch(label)]
    facts |= {"library_name": "vllm", "pipeline_tag": "text-generation", "tags": tags}
    return yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)


def _table(heads: Sequence[str], cells: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table of escaped cells; the first ``left`` columns are text, the others numbers."""
    # A ledger's head is its title, which a stranger's report may choose.
    lines = [
        f"| {' | '.join(escape(short_name(head)) for head in heads)} |",
        f"|{' --- |' * left + ' ---: |' * (len(heads) - left)}",
    ]
    lines += [f"| {' | '.join(escape(short_name(cell)) for cell in row)} |" for row in cells]
    return "\n".join(lines)


def _glance(report: Report) -> str:
    cells = [(tile.label, tile.value, tile.detail) for tile in tiles(report)]
    return "\n\n".join(["## At a glance", _table(TILE_HEADS, cells, left=3)])


def _budget(facts: BudgetFacts) -> str:
    parts = ["## Quality against size", _table(CHOICE_HEADS, choice_rows(facts))]
    if mixes := mix_rows(facts):
        parts += ["Mixes that were measured:", _table(MIX_HEADS, mixes)]
    return "\n\n".join([*parts, _caption(budget_caption(facts))])


def _overview(report: Report) -> str:
    source = report.source
    license_text = source.license or "not stated by the source; its terms apply"
    cells = [
        ("source", source.label),
        *([("base model", source.base_model)] if source.base_model else []),
        *([("source revision", source.revision)] if source.revision else []),
        *([("note", source.note)] if source.note else []),
        ("licence", license_text),
        ("weights", f"{source.parameters:,}"),
        ("made", report.created),
    ]
    return "\n\n".join(
        [
            "## Overview",
            _table(("", ""), cells, left=2),
            _table(("", "before", "after"), rows.gained_rows(report)),
            _caption(rows.size_caption(report)),
        ]
    )


def _done(report: Report) -> str:
    parts, schemes = ["## What was done"], rows.scheme_rows(report)
    if schemes:
        heads = ("scheme", "tensors", "weights", "bytes", "relative squared error")
        parts += ["These weights are quantized:", _table(heads, schemes)]
    if report.result.parts:
        parts += ["By part of the model:", _table(PART_HEADS, part_rows(report.result.parts), left=2)]
    if report.result.left_16bit:
        parts += [
            "These stay in 16 bit:",
            _table(("reason", "tensors", "bytes"), rows.kept_rows(report)),
        ]
    worst = rows.worst_rows(report)
    if worst:
        parts += ["Largest errors:", _table(("scheme", "tensor", "relative squared error"), worst, left=2)]
    note = rows.source_caption(report)
    return "\n\n".join([*parts, *([_caption(note)] if note else [])])


def _calibration(report: Report, facts: CalibrationFacts) -> str:
    parts = ["## Calibration"]
    solvers, worst = calibration_rows.solver_rows(facts), calibration_rows.worst_output_rows(facts)
    if solvers:
        parts.append(_table(calibration_rows.SOLVER_HEADS, solvers, left=2))
    if worst:
        parts.append(_table(calibration_rows.WORST_OUTPUT_HEADS, worst, left=2))
    notes = calibration_rows.calibration_notes(facts)
    if notes:
        parts.append("\n".join(f"- {escape(note)}" for note in notes))
    return "\n\n".join([*parts, _caption(calibration_rows.calibration_caption(report))])


def _context(facts: ContextFacts) -> str:
    parts = ["## Context", _caption(context_caption(facts)), _table(CONTEXT_HEADS, context_rows(facts))]
    if facts.cost is not None:
        parts.append(_table(CONTEXT_COST_HEADS, context_cost_rows(facts)))
    if facts.search is not None:
        parts.append(_table(SEARCH_HEADS, search_rows(facts), left=2))
    parts.append("\n".join(f"- {escape(note)}" for note in context_notes(facts)))
    return "\n\n".join(parts)


def _long(facts: LongFacts) -> str:
    parts = ["## Long context"]
    parts += [_table(heads, cells, left=left) for heads, cells, left in long_tables(facts)]
    return "\n\n".join([*parts, *([_caption(long_caption(facts))] if facts.text else [])])


def _adapters(facts: AdapterFacts) -> str:
    parts = ["## Training on long documents", _caption(adapter_caption(facts))]
    parts.append(_table(ADAPTER_HEADS, adapter_rows(facts)))
    parts.append("\n".join(f"- {escape(note)}" for note in adapter_notes(facts)))
    return "\n\n".join(parts)


def _kv(facts: KvFacts) -> str:
    parts = ["## KV cache", _caption(kv_caption(facts))]
    if facts.sizes:
        parts.append(_table(KV_HEADS, kv_rows(facts)))
    if facts.quality:
        parts.append(_table(KV_QUALITY_HEADS, kv_quality_rows(facts)))
    notes = kv_notes(facts)
    if notes:
        parts.append("\n".join(f"- {escape(note)}" for note in notes))
    return "\n\n".join(parts)


def _drafts(facts: DraftFacts) -> str:
    parts = ["## Drafts", _caption(draft_caption(facts))]
    if decoded := decoded_rows(facts):
        parts.append(_table(DECODING_HEADS, decoded, left=3))
    if measured := held_out_rows(facts):
        parts.append(_table(HELD_OUT_HEADS, measured))
    if trained := draft_rows(facts):
        parts.append(_table(DRAFT_HEADS, trained))
    parts.append("\n".join(f"- {escape(note)}" for note in draft_notes(facts)))
    return "\n\n".join(parts)


def _compounding(facts: CompoundingFacts) -> str:
    parts = ["## Worth", _table(COMPOUNDING_HEADS, compounding_rows(facts))]
    parts += [_table(ledger_heads(ledger), ledger_rows(ledger)) for ledger in facts.ledgers if ledger.steps]
    if claims := claim_rows(facts):
        parts.append(_table(CLAIM_HEADS, claims))
    parts.append(_caption(compounding_caption(facts)))
    return "\n\n".join([*parts, "\n".join(f"- {escape(note)}" for note in facts.notes)])


def _serving(report: Report) -> str:
    parts = [
        "## How to serve",
        fenced(report.serve.command, "bash"),
        "The path is that of this folder; the Hub id of a published copy does as well.",
        "Then, from another terminal:",
        fenced(request_command(report.serve.model), "bash"),
    ]
    if report.serve.notes:
        parts.append("\n".join(f"- {escape(note)}" for note in report.serve.notes))
    return "\n\n".join(parts)


def _verified(report: Report) -> str:
    found = report.verification
    if found is None:
        return f"## Verified\n\n{_caption(rows.UNVERIFIED)}"
    parts = [
        "## Verified",
        f"{escape(rows.verdict(found))} ({found.created[:10]}).",
        _table(("check", "status", "finding"), rows.check_rows(found), left=3),
    ]
    if found.engine is not None:
        parts.append(_table(("engine", ""), rows.engine_rows(found.engine), left=2))
    return "\n\n".join(parts)


def _evaluation(report: Report) -> str:
    quality = report.quality
    parts = ["## Evaluation"]
    if quality is not None:
        cells = [
            (row.measure, row.source, row.result, row.change, row.recovery)
            for row in rows.quality_rows(quality)
        ]
        parts.append(_table(("", "source", "result", "change", "recovery"), cells))
    parts.append(_caption(rows.quality_caption(report)))
    if quality is not None:
        parts += _evaluated(quality)
        parts += ["Measured with:", fenced(quality.command, "bash")]
    if report.gates:
        cells_gates = [rows.gate_row(gate) for gate in report.gates]
        parts += [
            "Gates of the recipe:",
            _table(("gate", "measured", "allowed", "verdict"), cells_gates),
        ]
        if notes := gate_notes(report.gates):
            parts.append("\n".join(f"- {escape(note)}" for note in notes))
    return "\n\n".join(parts)


def _evaluated(found: Evaluated) -> list[str]:
    """By domain, continuations and speed, where measured."""
    parts = []
    if domains := domain_rows(found.domains):
        parts.append(_table(DOMAIN_HEADS, domains))
    if generation := generation_rows(found.generation):
        parts.append(_table(GENERATION_HEADS, generation))
    if found.speed is not None:
        parts += [_table(SPEED_HEADS, speed_rows(found.speed)), _caption(speed_caption(found.speed))]
    return parts


def _limits(report: Report) -> str:
    lines = []
    if report.source.note:
        lines.append(
            f"The baseline of every table here is the source as it is: {report.source.note.rstrip('.')}."
        )
    if report.quality is None:
        lines.append("Quality was not measured.")
    else:
        lines.append(
            f"Quality was measured on {report.quality.text} in windows of {report.quality.context:,} tokens; "
            + (
                "other languages and tasks were not."
                if report.long
                else "other languages, other tasks and longer contexts were not."
            )
        )
        if not report.quality.tasks:
            lines.append("No downstream task was run.")
    failed = [gate.metric for gate in report.gates if not gate.passed]
    if failed:
        lines.append(f"This result failed the recipe's gates on {', '.join(failed)}.")
    lines.append("Limits and biases of the source model remain.")
    return "## Limits\n\n" + "\n".join(f"- {escape(line)}" for line in lines)


def _making(report: Report, recipe_yaml: str) -> str:
    device = report.device
    machine = f"{device.name}, {device.cores} cores, {size(device.memory_bytes)} of memory"
    return "\n\n".join(
        [
            "## How it was made",
            f"On {escape(machine)}:",
            _table(
                ("stage", "time", "peak memory", "peak device memory", "resumed"), rows.stage_rows(report)
            ),
            _table(("package", "version"), report.versions.items(), left=2),
            "The recipe (`recipe.yaml`), which `compress run recipe.yaml` follows again:",
            fenced(recipe_yaml, "yaml"),
        ]
    )


def _caption(text: str) -> str:
    return f"*{escape(text)}*"
