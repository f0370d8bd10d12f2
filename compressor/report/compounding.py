"""What a result is worth to who serves it: baseline against optimized, and the multipliers behind it.

Every cell says whether it was measured, computed from bytes and data sheets, or claimed by the recipe.
``docs/compounding.md`` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from compressor.report.record import Count, Measure, Ordered, Record
from compressor.report.words import number, percent, size

Mark = Literal["measured", "computed", "claimed", "not measured"]
Unit = Literal["bytes", "tokens", "tokens/s", "GPUs", "users", "s", "change", "difference", "price"]
RowKey = Literal[
    "weights", "cache", "reach", "fits", "gpus", "users", "speed", "gpu_speed", "throughput",
    "full_throughput", "first_token", "perplexity", "accuracy", "output_price",
    "input_price", "measured_speed", "measured_first_token", "measured_memory",
]  # fmt: skip

COMPOUNDING_HEADS = ("", "baseline", "optimized", "gain")
CLAIM_HEADS = ("claimed elsewhere", "claimed", "computed", "measured")
_LESS_IS_BETTER: frozenset[Unit] = frozenset({"bytes", "GPUs", "s", "price"})


class Cell(Record):
    """One number and where it comes from; ``value`` None: there is none, for the reason ``note``."""

    value: Measure | None
    mark: Mark
    note: str = ""


class CompoundingRow(Record):
    """One measure of both: the source in 16 bit, and the result with everything that the recipe does."""

    key: RowKey
    title: str
    unit: Unit
    baseline: Cell
    optimized: Cell

    @property
    def gain(self) -> float | None:
        """How many times better; None where a number is missing or nothing is better or worse."""
        before, after = self.baseline.value, self.optimized.value
        if self.unit in ("change", "difference") or not before or not after:
            return None
        return before / after if self.unit in _LESS_IS_BETTER else after / before


class Multiplier(Record):
    """One step of a ledger.

    Attributes:
        what: was done, or what the model is built with.
        of: whether it is the model's own (``model``) or the recipe's doing (``recipe``).
        alone: times fewer of what it touches: weights alone, or the cache alone.
        factor: times fewer of the ledger's whole, at this step.
        mark: of ``factor``: ``claimed`` where it rests on a number that the recipe states.
    """

    what: str
    of: Literal["model", "recipe"]
    alone: Measure
    factor: Measure
    mark: Mark


class Ledger(Record):
    """How one resource shrinks, step by step; the product of the factors is ``before / after``.

    Attributes:
        resource: ``memory`` (bytes held), ``traffic`` (bytes moved for a token that is written) or
            ``arithmetic`` (operations for it). They are never multiplied with one another.
        title: for people.
        before: of a twin with as many weights, all of them used for each token, in 16 bit, with full
            attention in every layer and one token a pass.
        after: of the result.
        steps: in order.
    """

    resource: Literal["memory", "traffic", "arithmetic"]
    title: str
    before: Measure
    after: Measure
    steps: tuple[Multiplier, ...]

    @property
    def product(self) -> float:
        """Of all factors."""
        return math.prod(step.factor for step in self.steps)


class ServePoint(Record):
    """What it is computed for.

    Attributes:
        gpu: its name.
        gpu_source: where its figures are from.
        memory_bytes: of one GPU; 90% of it is used.
        bandwidth: bytes a second that one reads.
        flops: format -> operations a second, dense.
        context: tokens of each user.
        concurrency: users at once.
        gpus: that the baseline and the result need for them, or those of the recipe.
        efficiency: share of the bandwidth that kernels of source and result are taken to reach.
        step_overhead_s: of every step beside.
        price_per_hour: of one GPU, or None.
        tokens_per_pass: of the result with its draft; 1 without.
        tokens_per_pass_mark: where that is from.
        active_parameters: that multiply one token.
        embedding_parameters: that are looked up only; publishers count them as active.
        parameters: of the model, without prediction layers.
    """

    gpu: str
    gpu_source: str
    memory_bytes: Count
    bandwidth: Measure
    flops: Ordered[Measure]
    context: Count
    concurrency: Count
    gpus: tuple[Count, Count]
    efficiency: tuple[Measure, Measure] = (1.0, 1.0)
    step_overhead_s: Measure = 0.0
    price_per_hour: Measure | None
    tokens_per_pass: Measure
    tokens_per_pass_mark: Mark
    active_parameters: Measure
    embedding_parameters: Count
    parameters: Count


Range = Annotated[tuple[Measure, Measure], Field(description="Lowest and highest.")]


class ClaimedGain(Record):
    """What somebody claims of such a model, for comparison: lowest and highest, before and after."""

    key: RowKey
    baseline: Range
    optimized: Range
    computed: tuple[Measure | None, Measure | None]
    measured: tuple[Measure | None, Measure | None]


class CompoundingFacts(Record):
    """The table, the ledgers and the claims, with what they are computed for.

    Attributes:
        point: see there.
        rows: the table.
        ledgers: memory, traffic, arithmetic.
        claims: of the recipe; empty where it states none.
        notes: what the numbers leave out.
    """

    point: ServePoint
    rows: tuple[CompoundingRow, ...]
    ledgers: tuple[Ledger, ...]
    claims: tuple[ClaimedGain, ...] = ()
    notes: tuple[str, ...] = ()


def compounding_caption(facts: CompoundingFacts) -> str:
    """One line: on what, for whom."""
    point = facts.point
    users = f"{point.concurrency:,} user{'' if point.concurrency == 1 else 's'}"
    passes = ""
    if point.tokens_per_pass != 1:
        passes = f"; {number(point.tokens_per_pass, 2)} tokens a pass ({point.tokens_per_pass_mark})"
    card = f"{point.gpu} ({size(point.memory_bytes)}, {size(int(point.bandwidth))}/s)"
    active = _weights(point.active_parameters)
    if point.embedding_parameters:
        active += f" ({_weights(point.active_parameters + point.embedding_parameters)} with the embedding)"
    return (
        f"{users} of {point.context:,} tokens on {card}: {_gpus(point.gpus[0])} before, "
        f"{_gpus(point.gpus[1])} after{passes}. Of {_weights(point.parameters)} weights {active} "
        f"multiply each token. {_bounds(point)}"
    )


def _bounds(point: ServePoint) -> str:
    if point.efficiency == (1, 1) and not point.step_overhead_s:
        return "Computed speeds are what memory and arithmetic allow at most."
    before, after = (percent(share) for share in point.efficiency)
    return (
        f"Computed speeds take kernels to reach {before} of the bandwidth before and {after} after, and "
        f"{1e6 * point.step_overhead_s:,.0f} microseconds of a step beside."
    )


def compounding_rows(facts: CompoundingFacts) -> list[tuple[str, str, str, str]]:
    """(measure, baseline, optimized, gain), each number with its mark."""
    return [
        (row.title, cell_text(row.unit, row.baseline), cell_text(row.unit, row.optimized), times(row.gain))
        for row in facts.rows
    ]


def cell_text(unit: Unit, cell: Cell) -> str:
    """A number in its unit, and its mark."""
    if cell.value is None:
        return cell.note or cell.mark
    return f"{amount(unit, cell.value)} ({cell.mark})"


def cell_number(unit: Unit, cell: Cell) -> str:
    """A number in its unit without its mark; why there is none where there is none."""
    return (cell.note or "-") if cell.value is None else amount(unit, cell.value)


def amount(unit: Unit, value: float) -> str:
    """A number as people read it."""
    if not math.isfinite(value):
        return number(value, 1)
    if unit == "bytes":
        return size(round(value))
    if unit == "change":
        return percent(value, signed=True)
    if unit == "difference":
        return f"{value:+,.4f}"
    if unit in ("tokens", "GPUs", "users"):
        return f"{round(value):,}"
    if unit == "s" and value < 0.1:
        return f"{_significant(1e3 * value)} ms"
    return f"{_significant(value)}{' s' if unit == 's' else ''}"


def ledger_heads(ledger: Ledger) -> tuple[str, str, str]:
    """Heads of a ledger's table."""
    return ledger.title, "times fewer, alone", "of the whole"


def ledger_rows(ledger: Ledger) -> list[tuple[str, str, str]]:
    """Its steps, and their product."""
    shown = size if ledger.resource != "arithmetic" else _operations
    steps = [
        (
            f"{step.what} ({'the model' if step.of == 'model' else step.mark})",
            times(step.alone),
            times(step.factor),
        )
        for step in ledger.steps
    ]
    return [
        *steps,
        (f"{shown(round(ledger.before))} -> {shown(round(ledger.after))}", "", times(ledger.product)),
    ]


def claim_rows(facts: CompoundingFacts) -> list[tuple[str, str, str, str]]:
    """What is claimed, and what is computed and measured of the same."""
    rows = {row.key: row for row in facts.rows}
    return [
        (
            rows[claim.key].title,
            f"{_range(claim.baseline)} -> {_range(claim.optimized)}",
            _pair(rows[claim.key].unit, claim.computed, "not computed"),
            _pair(rows[claim.key].unit, claim.measured, "not measured"),
        )
        for claim in facts.claims
        if claim.key in rows
    ]


def _pair(unit: Unit, values: Sequence[float | None], missing: str) -> str:
    if all(value is None for value in values):
        return missing
    return " -> ".join("-" if value is None else amount(unit, value) for value in values)


def _range(values: tuple[float, float]) -> str:
    low, high = values
    return f"{low:,g}" if low == high else f"{low:,g} to {high:,g}"


def times(value: float | None) -> str:
    """``2.31x``, or a hyphen."""
    return "-" if value is None else f"{number(value, 2)}x"


def _significant(value: float) -> str:
    """Three digits at least; all of those before the point."""
    if value >= 100 or value == 0:
        return number(value, 0)
    return number(value, max(0, 2 - math.floor(math.log10(abs(value)))))


def _weights(count: float) -> str:
    return f"{count / 1e9:,.2f}B" if count >= 1e9 else f"{count / 1e6:,.2f}M"


def _operations(count: int) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= limit:
            return f"{count / limit:,.2f} {unit}FLOP"
    return f"{count / 1e6:,.2f} MFLOP"


def _gpus(count: int) -> str:
    return f"{count:,} GPU{'' if count == 1 else 's'}"
