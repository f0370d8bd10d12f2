"""A report on the terminal: gained, lost, cost. Plain text where there is no terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
from compressor.report.decoding import DECODING_HEADS, decoding_notes, decoding_rows
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
from compressor.report.long import LongFacts, long_caption, long_facts, long_tables
from compressor.report.measured import Evaluated, Gate
from compressor.report.model import Report
from compressor.report.side_by_side import LAYER_HEADS, SideBySide
from compressor.report.verification import Verification
from compressor.report.words import size, visible

MIN_WIDTH, MAX_WIDTH = 60, 200
_NARROW = 80
_MOST_DIGITS = 12
# Between numbers of one cell: "1 to 8", "3 of 4", "75% / 25%", "75% 25%".
_SEVERAL = re.compile(r" to | of | / |(?<=%) ")


def report_console(file: IO[str], width: int | None = None) -> Console:
    """A console that interprets nothing in what it prints and colours only a terminal; 60 to 200 columns."""
    console = Console(file=file, width=width, markup=False, emoji=False, highlight=False)
    console.width = min(max(console.width, MIN_WIDTH), MAX_WIDTH)
    return console


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints the report; the first line says how much smaller and at what loss.

    Without a console it goes to stdout. Only the ``vllm serve`` line may be longer than the console is wide:
    it must survive copying.
    """
    show = _Printer(console or report_console(sys.stdout))
    failed = any(not gate.passed for gate in report.gates)
    show.line(f"{report.name}: {rows.headline(report)}", style="bold red" if failed else "bold green")
    show.line(f"from {report.source.label}", style="dim")

    show.title("Gained")
    show.table(("", "before", "after"), rows.gained_rows(report))
    show.table(("scheme", "tensors", "weights", "bytes", "rel. sq. error"), rows.scheme_rows(report))
    show.table(("left in 16 bit because", "tensors", "bytes"), rows.kept_rows(report))
    show.line(rows.size_caption(report), style="dim")

    show.title("Lost")
    if report.quality is not None:
        measured = rows.quality_rows(report.quality)
        cells = [(row.measure, row.source, row.result, row.change) for row in measured]
        show.table(("", "source", "result", "change"), cells)
    show.table(("gate", "measured", "allowed", "verdict"), [rows.gate_row(gate) for gate in report.gates])
    for note in gate_notes(report.gates):
        show.line(note)
    show.line(rows.quality_caption(report), style="dim")
    if report.quality is not None:
        _show_evaluated(show, report.quality)

    if report.budget is not None:
        _show_budget(show, report.budget)
    if report.context is not None:
        _show_context(show, report.context)
    if report.adapters is not None:
        _show_adapters(show, report.adapters)

    if report.calibration is not None:
        _show_calibration(show, report.calibration)
        show.line(calibration_rows.calibration_caption(report), style="dim")

    if report.long is not None:
        _show_long(show, report.long)

    if report.kv is not None:
        _show_kv(show, report.kv)

    if report.drafts is not None:
        _show_drafts(show, report.drafts)

    if report.compounding is not None:
        _show_compounding(show, report.compounding)

    show.title("Cost")
    show.table(("stage", "time", "memory", "device", "resumed"), rows.stage_rows(report))
    device = report.device
    show.line(f"on {device.name}, {device.cores} cores, {size(device.memory_bytes)} of memory", style="dim")

    show.title("Serve")
    show.command(report.serve.command)
    for note in report.serve.notes:
        show.line(note, style="dim")

    show.title("Verified")
    if report.verification is None:
        show.line(rows.UNVERIFIED, style="dim")
    else:
        _show_verification(show, report.verification)


def print_side_by_side(compared: SideBySide, console: Console) -> None:
    """Prints runs side by side: warnings first, measures, and where layers differ most."""
    show = _Printer(console)
    for warning in compared.warnings:
        show.line(f"warning: {warning}", style="yellow")
    show.table(("", *compared.names), [(row.title, *row.texts) for row in compared.rows])
    if compared.layers:
        show.title("Layers whose errors differ most")
        show.table((*LAYER_HEADS, *compared.names), compared.layers)


def print_verification(found: Verification, console: Console) -> None:
    """Prints what a verification found, check by check; the last line is the verdict."""
    _show_verification(_Printer(console), found)


def print_long(measured: Mapping[str, Any], console: Console) -> None:
    """Prints what ``LongResult.to_json`` holds."""
    _show_long(_Printer(console), long_facts(measured))


def print_evaluated(measured: Mapping[str, Any], gates: Sequence[Gate], console: Console) -> None:
    """Prints what ``EvalResult.to_json`` holds of tasks, domains, continuations and speed, and gates."""
    show = _Printer(console)
    quality = Evaluated.of(measured)
    show.table(
        ("task", "source", "result", "change"),
        [(row.measure, row.source, row.result, row.change) for row in rows.task_rows(quality.tasks)],
    )
    _show_evaluated(show, quality)
    show.table(("gate", "measured", "allowed", "verdict"), [rows.gate_row(gate) for gate in gates])
    for note in gate_notes(gates):
        show.line(note)


def print_decoding(measured: Mapping[str, Any], console: Console) -> None:
    """Prints what ``DecodingResult.to_json`` holds."""
    show = _Printer(console)
    show.title("Decoding with proposed tokens")
    _show_decoding(show, decoding_rows(measured))
    for note in decoding_notes(measured):
        show.line(note)


def _show_evaluated(show: _Printer, found: Evaluated) -> None:
    show.table(DOMAIN_HEADS, domain_rows(found.domains))
    show.table(GENERATION_HEADS, generation_rows(found.generation))
    if found.speed is not None:
        show.table(SPEED_HEADS, speed_rows(found.speed))
        show.line(speed_caption(found.speed), style="dim")


def _show_calibration(show: _Printer, facts: CalibrationFacts) -> None:
    show.title("Calibration")
    show.table(calibration_rows.SOLVER_HEADS, calibration_rows.solver_rows(facts), left=2)
    # Where both do not fit on a line, names matter more than schemes.
    first = 1 if show.is_narrow else 0
    worst = [row[first:] for row in calibration_rows.worst_output_rows(facts)]
    show.table(calibration_rows.WORST_OUTPUT_HEADS[first:], worst, left=2 - first)
    show.table(EXPERT_HEADS, expert_rows(facts))
    for note in calibration_rows.calibration_notes(facts):
        show.line(note)


def _show_budget(show: _Printer, facts: BudgetFacts) -> None:
    show.title("Quality against size")
    show.table(CHOICE_HEADS, choice_rows(facts))
    show.table(MIX_HEADS, mix_rows(facts))
    show.line(budget_caption(facts), style="dim")


def _show_context(show: _Printer, facts: ContextFacts) -> None:
    show.title("Context")
    show.table(CONTEXT_HEADS, context_rows(facts))
    show.table(CONTEXT_COST_HEADS, context_cost_rows(facts))
    show.table(SEARCH_HEADS, search_rows(facts), left=2)
    show.line(context_caption(facts), style="dim")
    for note in context_notes(facts):
        show.line(note)


def _show_long(show: _Printer, facts: LongFacts) -> None:
    show.title("Long context")
    for heads, rows_of, left in long_tables(facts):
        show.table(heads, rows_of, left=left)
    show.line(long_caption(facts), style="dim")


def _show_adapters(show: _Printer, facts: AdapterFacts) -> None:
    show.title("Training on long documents")
    show.table(ADAPTER_HEADS, adapter_rows(facts))
    show.line(adapter_caption(facts), style="dim")
    for note in adapter_notes(facts):
        show.line(note)


def _show_kv(show: _Printer, facts: KvFacts) -> None:
    show.title("KV cache")
    show.table(KV_HEADS, kv_rows(facts))
    show.table(KV_QUALITY_HEADS, kv_quality_rows(facts))
    show.line(kv_caption(facts), style="dim")
    for note in kv_notes(facts):
        show.line(note)


def _show_decoding(show: _Printer, found: list[tuple[str, ...]]) -> None:
    # Where it does not fit on a line, a note says whether texts are the same.
    columns = len(DECODING_HEADS) - show.is_narrow
    show.table(DECODING_HEADS[:columns], [row[:columns] for row in found])


def _show_drafts(show: _Printer, facts: DraftFacts) -> None:
    show.title("Drafts")
    _show_decoding(show, decoded_rows(facts))
    show.table(HELD_OUT_HEADS, held_out_rows(facts))
    show.table(DRAFT_HEADS, draft_rows(facts))
    show.line(draft_caption(facts), style="dim")
    for note in draft_notes(facts):
        show.line(note)


def _show_compounding(show: _Printer, facts: CompoundingFacts) -> None:
    show.title("Worth")
    show.table(COMPOUNDING_HEADS, compounding_rows(facts))
    for ledger in facts.ledgers:
        if ledger.steps:
            show.table(ledger_heads(ledger), ledger_rows(ledger))
    show.table(CLAIM_HEADS, claim_rows(facts))
    show.line(compounding_caption(facts), style="dim")
    for note in facts.notes:
        show.line(note, style="dim")


def _show_verification(show: _Printer, found: Verification) -> None:
    show.table(("check", "status", "finding"), rows.check_rows(found), left=3)
    show.table(("engine", ""), rows.engine_rows(found.engine), left=2)
    show.line(rows.verdict(found), style="bold green" if found.passed else "bold red")


class _Printer:
    """Prints strangers' strings: visible characters only, and only those that the stream can encode."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @property
    def is_narrow(self) -> bool:
        """Whether tables of several names do not fit."""
        return self._console.width < _NARROW

    def line(self, text: str, *, style: str = "") -> None:
        self._console.print(self._text(text, style))

    def title(self, text: str) -> None:
        self._console.print()
        self.line(text, style="bold")

    def command(self, text: str) -> None:
        self._console.print(self._text(text, "cyan"), soft_wrap=True)

    def table(self, heads: Sequence[str], cells: Iterable[Sequence[str]], *, left: int = 1) -> None:
        """One table; nothing if it has no rows. The first ``left`` columns are words, the others numbers."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
        found = list(cells)
        for index, head in enumerate(heads):
            is_number = index >= left
            # A number is never cut, nor a word above it; names are, where the terminal is narrow. Of a range,
            # and of several numbers, each has a line there.
            parts = [part for row in found for part in _SEVERAL.split(row[index])]
            numbers = [part for part in parts if any(map(str.isdigit, part))]
            words = [*head.split(), *numbers] if is_number else []
            table.add_column(
                head,
                justify="right" if is_number else "left",
                overflow="fold",
                min_width=min(max(map(len, words), default=0), _MOST_DIGITS),
            )
        for row in found:
            table.add_row(*(self._text(cell) for cell in row))
        if table.row_count:
            self._console.print(table)

    def _text(self, text: str, style: str = "") -> Text:
        encoding = self._console.encoding
        shown = visible(text).encode(encoding, "backslashreplace").decode(encoding)
        return Text(shown, style=style, overflow="fold")
