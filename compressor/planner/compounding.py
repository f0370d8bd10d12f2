"""The compounding table of a plan or a run: the source in 16 bit against all that the recipe does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compressor.planner.attention_work import attention_layers, full_layers
from compressor.planner.kv_architectures import CannotTell
from compressor.planner.kv_bytes import kv_layers
from compressor.planner.ledgers import ledgers
from compressor.planner.roofline import prompt_seconds, tokens_per_second
from compressor.planner.served import (
    Cache,
    Served,
    plain_cache,
    planned_cache,
    planned_proposals,
    reaches,
)
from compressor.planner.weight_load import result_load, source_load, widened_load
from compressor.recipe.gpus import Gpu
from compressor.recipe.serve import ServeSection
from compressor.report.compounding import (
    Cell,
    ClaimedGain,
    CompoundingFacts,
    CompoundingRow,
    Mark,
    RowKey,
    ServePoint,
    Unit,
)

if TYPE_CHECKING:
    from compressor.planner.plan import Plan

_DEFAULT_CONTEXT = 8192
_HOUR_S, _MILLION = 3600, 1e6
_NO_FIT = "does not fit"


@dataclass(frozen=True)
class Found:
    """What a finished run knows beyond its plan.

    Attributes:
        cache: as it was fitted, or None where it is as planned.
        tokens_per_pass: that were measured with the draft, or None.
        weights_measured: whether source and result bytes were counted in files.
        changes: titles, keys and values of changes of quality that were measured.
        rows: what was measured on the device at hand.
        notes: on these.
    """

    cache: Cache | None = None
    tokens_per_pass: float | None = None
    weights_measured: tuple[bool, bool] = (False, False)
    changes: tuple[tuple[str, RowKey, float], ...] = ()
    rows: tuple[CompoundingRow, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Point:
    """Who is served, and on what; ``gpus``: of source and result."""

    gpu: Gpu
    tokens: int
    users: int
    gpus: tuple[int, int]
    price: float | None
    efficiency: tuple[float, float]
    overhead_s: float

    def speed(self, side: int, served: Served, users: int, gpus: int) -> float:
        """Tokens a second of each user of source (0) or result (1)."""
        gpu = replace(self.gpu, bandwidth=self.gpu.bandwidth * self.efficiency[side])
        return tokens_per_second(served.load(self.tokens), users, gpu, gpus, fixed_s=self.overhead_s)

    @property
    def own_gpus(self) -> str:
        """Words for titles of rows whose columns have GPUs of their own."""
        before, after = self.gpus
        return "" if before == after else f", on {before:,} and {after:,} GPUs"


def compounding_facts(plan: Plan, found: Found | None = None) -> tuple[CompoundingFacts | None, str]:
    """The table, the ledgers and the claims; None and a reason where the config does not tell the cache.

    Args:
        plan: of a recipe.
        found: what its run measured; by default all is computed.
    """
    found = found or Found()
    config = plan.source.config
    layers, reason = kv_layers(config)
    attention, why = attention_layers(config)
    if not layers or not attention:
        return None, reason or why or "no layer of the model has a cache"
    try:
        twin_attention, twin_layers = full_layers(config)
    except CannotTell as cannot:
        return None, str(cannot)
    section = plan.loaded.recipe.serve or ServeSection()
    passed, mark = _passed(section, found)
    before, after = _served(plan, found, passed)
    tokens = section.context or min(_DEFAULT_CONTEXT, after.reach)
    gpu, users = section.card(), section.concurrency
    needed = before.gpus(gpu, tokens, users), after.gpus(gpu, tokens, users)
    gpus = needed if section.gpus is None else (section.gpus, section.gpus)
    overhead_s = section.step_overhead_us / 1e6
    point = _Point(gpu, tokens, users, gpus, section.price_per_hour, section.efficiency, overhead_s)
    rows = _rows(point, before, after, needed, found)
    twin = replace(before, attention=twin_attention, cache=plain_cache(twin_layers))
    facts = CompoundingFacts(
        point=ServePoint(
            gpu=gpu.name,
            gpu_source=gpu.source,
            memory_bytes=gpu.memory_bytes,
            bandwidth=gpu.bandwidth,
            flops={str(arithmetic): rate for arithmetic, rate in gpu.flops.items()},
            context=tokens,
            concurrency=users,
            gpus=gpus,
            efficiency=section.efficiency,
            step_overhead_s=overhead_s,
            price_per_hour=section.price_per_hour,
            tokens_per_pass=1.0 if after.proposals is None else after.proposals.passed,
            tokens_per_pass_mark=mark if after.proposals is not None else "computed",
            active_parameters=before.weights.active,
            embedding_parameters=before.weights.embedding_parameters,
            parameters=plan.prediction.parameters - before.weights.prediction_parameters,
        ),
        rows=tuple(rows),
        ledgers=ledgers(before, after, twin, tokens, users, mark),
        claims=tuple(_claims(section, rows)),
        notes=(*_notes(plan, section, before, tokens, after), *found.notes),
    )
    return facts, ""


def _passed(section: ServeSection, found: Found) -> tuple[float | None, Mark]:
    """Tokens a pass with the draft, and where that is from."""
    if found.tokens_per_pass is not None:
        return found.tokens_per_pass, "measured"
    return section.tokens_per_pass, "claimed" if section.tokens_per_pass is not None else "not measured"


def _served(plan: Plan, found: Found, passed: float | None) -> tuple[Served, Served]:
    """Source and result."""
    config, result = plan.source.config, plan.configured.config
    reach = reaches(plan)
    layers, _ = kv_layers(config)
    work, _ = attention_layers(config)
    weights = result_load(plan.claims, result)
    if plan.budget is not None and (more := plan.budget.open_bytes) is not None:
        weights = widened_load(weights, more, plan.budget.routed_bytes_share)
    before = Served(source_load(plan.claims, config), plain_cache(layers), work, reach[0])
    after = Served(
        weights,
        found.cache or planned_cache(plan),
        work,
        reach[1],
        None if passed is None else planned_proposals(plan, passed),
    )
    return before, after


# --- the table ---


def _rows(
    point: _Point, before: Served, after: Served, needed: tuple[int, int], found: Found
) -> list[CompoundingRow]:
    gpu, tokens, users = point.gpu, point.tokens, point.users
    same = point.gpus[0]
    who = f"{users:,} user{'' if users == 1 else 's'}"
    cards = f"{same:,} GPU{'' if same == 1 else 's'}"
    sides = (before, after)
    measured: tuple[Mark, Mark] = tuple(  # type: ignore[assignment]
        "measured" if was else "computed" for was in found.weights_measured
    )
    own = point.own_gpus
    speeds = _speeds(point, sides, needed)
    most = [served.users(gpu, same, tokens) for served in sides]
    rows = [
        CompoundingRow(
            key="weights",
            title="weights",
            unit="bytes",
            baseline=Cell(value=before.weights.held_bytes, mark=measured[0]),
            optimized=Cell(value=after.weights.held_bytes, mark=measured[1]),
        ),
        _row("cache", f"cache of {tokens:,} tokens", "bytes", [side.cache.held(tokens) for side in sides]),
        _row("reach", "longest context it reads", "tokens", [side.reach for side in sides]),
        _row(
            "fits",
            f"longest context of {who} on {cards}",
            "tokens",
            [side.longest(gpu, same, users) for side in sides],
        ),
        _row("gpus", f"GPUs for {who} of {tokens:,} tokens", "GPUs", needed),
        _row("users", f"users of {tokens:,} tokens on {cards}", "users", most),
        _row("speed", f"tokens/s of each user{own}", "tokens/s", speeds),
        _row(
            "gpu_speed",
            "the same for each GPU",
            "tokens/s",
            [
                None if speed is None else speed / count
                for speed, count in zip(speeds, point.gpus, strict=True)
            ],
        ),
    ]
    if users > 1:
        together = [None if speed is None else users * speed for speed in speeds]
        rows.append(_row("throughput", f"tokens/s of all {who}{own}", "tokens/s", together))
    full = [
        count * point.speed(index, side, count, same) if count else None
        for index, (side, count) in enumerate(zip(sides, most, strict=True))
    ]
    rows.append(_row("full_throughput", f"tokens/s of all that fit on {cards}", "tokens/s", full))
    rows += _paid(point, sides, needed)
    return [*rows, *found.rows, *_quality(found)]


def _row(key: RowKey, title: str, unit: Unit, values: Sequence[float | None]) -> CompoundingRow:
    """A computed row; None is what does not fit."""
    cells = [
        Cell(value=value, mark="computed", note=_NO_FIT if value is None else "")
        for value in map(_float, values)
    ]
    return CompoundingRow(key=key, title=title, unit=unit, baseline=cells[0], optimized=cells[1])


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _fitting(point: _Point, needed: tuple[int, int]) -> list[bool]:
    return [want <= have for want, have in zip(needed, point.gpus, strict=True)]


def _speeds(point: _Point, sides: Sequence[Served], needed: tuple[int, int]) -> list[float | None]:
    """Of each user, each model on its own GPUs."""
    return [
        point.speed(index, side, point.users, count) if fits else None
        for index, (side, count, fits) in enumerate(
            zip(sides, point.gpus, _fitting(point, needed), strict=True)
        )
    ]


def _paid(point: _Point, sides: Sequence[Served], needed: tuple[int, int]) -> list[CompoundingRow]:
    """Seconds to the first token, and what a million tokens cost where the recipe has a price."""
    prompts = [
        prompt_seconds(side.load(point.tokens), point.tokens, point.gpu, count) if fits else None
        for side, count, fits in zip(sides, point.gpus, _fitting(point, needed), strict=True)
    ]
    own = point.own_gpus
    title = f"time to the first token behind {point.tokens:,}{own}"
    rows = [_row("first_token", title, "s", prompts)]
    if point.price is None:
        return rows
    speeds = _speeds(point, sides, needed)
    hourly = [point.price * count for count in point.gpus]
    written = [
        None if speed is None else price / (_HOUR_S * point.users * speed) * _MILLION
        for price, speed in zip(hourly, speeds, strict=True)
    ]
    read = [
        None if seconds is None else price / _HOUR_S * seconds / point.tokens * _MILLION
        for price, seconds in zip(hourly, prompts, strict=True)
    ]
    return [
        *rows,
        _row("output_price", "price of a million tokens written", "price", written),
        _row("input_price", "price of a million tokens read", "price", read),
    ]


def _quality(found: Found) -> list[CompoundingRow]:
    """Changes against the source."""
    reference = Cell(value=None, mark="measured", note="reference")
    if not found.changes:
        unknown = Cell(value=None, mark="not measured")
        row = CompoundingRow(
            key="perplexity", title="perplexity", unit="change", baseline=reference, optimized=unknown
        )
        return [row]
    return [
        CompoundingRow(
            key=key,
            title=title,
            # An accuracy moves by points, whatever it was; other metrics in units of their own.
            unit="difference" if key == "accuracy" else "change",
            baseline=reference,
            optimized=Cell(value=change, mark="measured"),
        )
        for title, key, change in found.changes
    ]


# --- claims and notes ---


def _claims(section: ServeSection, rows: Sequence[CompoundingRow]) -> list[ClaimedGain]:
    known = {row.key: row for row in rows}
    claims = []
    for key, claim in section.claims.items():
        row = known.get(key)
        cells = () if row is None else (row.baseline, row.optimized)
        values = [cell.value for cell in cells] or [None, None]
        was_measured = bool(cells) and all(cell.mark == "measured" for cell in cells)
        claims.append(
            ClaimedGain(
                key=key,
                baseline=claim.baseline,
                optimized=claim.optimized,
                computed=(None, None) if was_measured else (values[0], values[1]),
                measured=(values[0], values[1]) if was_measured else (None, None),
            )
        )
    return claims


def _notes(plan: Plan, section: ServeSection, before: Served, tokens: int, after: Served) -> list[str]:
    notes = [
        "GPUs are a lower bound: weights and caches divided evenly, 90% of the memory used; engines may want "
        "a number that divides the heads."
    ]
    if tokens > before.reach:
        notes.append(
            f"The source reads {before.reach:,} tokens; its column counts {tokens:,} as if it read them."
        )
    if tokens > after.reach:
        notes.append(f"The result reads {after.reach:,} tokens, fewer than the {tokens:,} counted here.")
    if plan.budget is not None and plan.budget.choice is None:
        counted = "all that the budget allows"
        if plan.budget.open_bytes is None:
            counted = "the smallest candidates"
        notes.append(f"Schemes are chosen while it runs: the result's weights are counted as {counted}.")
    if plan.drafts is not None and after.proposals is None:
        notes.append(
            "The draft is not counted: how many tokens a pass it gives is not measured yet "
            "(serve.tokens_per_pass states a guess)."
        )
    if plan.drafts is None and section.tokens_per_pass is not None:
        notes.append("serve.tokens_per_pass has no effect without a section drafts.")
    if plan.kv is not None and not plan.kv.servable:
        notes.append("vLLM 0.32 cannot serve this cache: its bytes are those of this package's own.")
    return notes
