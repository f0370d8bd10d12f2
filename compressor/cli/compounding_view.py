"""The compounding table in the plan: what the recipe is worth to who serves its result, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def print_compounding(console: Console, facts: CompoundingFacts | None, reason: str) -> None:
    """Prints table, ledgers and claims on the console, or why there are none."""
    if facts is None:
        console.print(Text(f"\nserving not computed: {reason}"))
        return
    console.print(Text(f"\n{compounding_caption(facts)}"))
    _print(console, COMPOUNDING_HEADS, compounding_rows(facts))
    for ledger in facts.ledgers:
        if ledger.steps:
            console.print()
            _print(console, ledger_heads(ledger), ledger_rows(ledger))
    if claims := claim_rows(facts):
        console.print()
        _print(console, CLAIM_HEADS, claims)
    for note in facts.notes:
        console.print(Text(note, style="dim"))


def _print(console: Console, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
