"""How far a result reads, in a report: what was written for it, and what it costs short prompts."""

from __future__ import annotations

from compressor.report.record import Count, Measure, Record
from compressor.report.words import counted, number, percent

CONTEXT_HEADS = ("config.json", "before", "after")
SEARCH_HEADS = ("search", "best from", "nats past the original length", "nats within")
CONTEXT_COST_HEADS = ("at the original length", "source", "scaled", "change")


class WrittenField(Record):
    """A field of config.json that scaling changes: its path, and JSON before and after; "-" for neither."""

    name: str
    before: str
    after: str


class ScalingCost(Record):
    """The 16-bit source with its positions scaled against itself without, on one text.

    Attributes:
        source: perplexity without.
        scaled: perplexity with.
        increase: relative.
        increase_ci95: its 95% interval, or None.
        tokens: of the text.
        context: tokens of one window.
        text: label of the text.
        is_all: whether this is all that was changed, so that the quality table says the same.
    """

    source: Measure
    scaled: Measure
    increase: Measure
    increase_ci95: tuple[Measure, Measure] | None
    tokens: Count
    context: Count
    text: str
    is_all: bool


class SearchGeneration(Record):
    """The best candidate after a generation: nats a token past the original length, and within it."""

    long: Measure
    short: Measure
    origin: str


class FactorSearch(Record):
    """How the factors of longrope were found.

    Attributes:
        objective: what candidates were compared by.
        tried: candidates.
        documents: tokens of each document that they were scored on.
        yarn: YaRN on these.
        generations: the best after each, the seeds' first.
        held_out: tokens of each of the other documents that the choice was compared with YaRN on; none where
            there was nothing to compare.
        difference: nats a token past the original length that the choice is above YaRN on those, or None.
        short_difference: the same within it.
        accepted: whether the choice is what the result has; else it has YaRN.
    """

    objective: str
    tried: Count
    documents: tuple[Count, ...]
    yarn: SearchGeneration
    generations: tuple[SearchGeneration, ...]
    held_out: tuple[Count, ...]
    difference: Measure | None
    short_difference: Measure | None
    accepted: bool


class ContextFacts(Record):
    """How positions are scaled.

    Attributes:
        method: of the frequencies, as the result has it.
        factor: of the scaling.
        original_length: tokens that the source was trained at.
        target_length: tokens that were asked for.
        length: tokens that the result reads.
        fields: what config.json says otherwise.
        notes: what a person should know.
        cost: what scaling alone costs, or None where nothing was measured.
        search: how its factors were found, or None where they were not searched.
    """

    method: str
    factor: Measure
    original_length: Count
    target_length: Count
    length: Count
    fields: tuple[WrittenField, ...]
    notes: tuple[str, ...] = ()
    cost: ScalingCost | None = None
    search: FactorSearch | None = None


def context_caption(facts: ContextFacts) -> str:
    """One line: method, factor, lengths."""
    return (
        f"Reads {facts.length:,} tokens instead of {facts.original_length:,}: {facts.method}, factor "
        f"{facts.factor:g}"
    )


def context_rows(facts: ContextFacts) -> list[tuple[str, str, str]]:
    """The fields of config.json."""
    return [(field.name, field.before, field.after) for field in facts.fields]


def context_cost_rows(facts: ContextFacts) -> list[tuple[str, str, str, str]]:
    """Perplexity without and with, in 16 bit."""
    cost = facts.cost
    if cost is None:
        return []
    change = percent(cost.increase, signed=True)
    if cost.increase_ci95 is not None:
        low, high = cost.increase_ci95
        change += f" (95%: {percent(low, signed=True)} to {percent(high, signed=True)})"
    return [("perplexity, 16 bit, scaling alone", number(cost.source, 3), number(cost.scaled, 3), change)]


def search_rows(facts: ContextFacts) -> list[tuple[str, str, str, str]]:
    """YaRN and the best of each generation, on the documents of the search."""
    search = facts.search
    if search is None:
        return []
    rows = [("YaRN", search.yarn)]
    rows += [(f"generation {number}", best) for number, best in enumerate(search.generations)]
    return [(name, best.origin, f"{best.long:.4f}", f"{best.short:.4f}") for name, best in rows]


def context_notes(facts: ContextFacts) -> list[str]:
    """What scaling does to short prompts, and what else is to be known."""
    searched = [_search_note(facts.search)] if facts.search is not None else []
    return [*facts.notes, _cost_note(facts), *searched]


def _search_note(search: FactorSearch) -> str:
    text = (
        f"Factors were searched by {search.objective}: {search.tried:,} candidates on "
        f"{counted(len(search.documents), 'document')}, together {sum(search.documents):,} tokens"
    )
    if not search.held_out:
        return f"{text}."
    others, tokens = len(search.held_out), sum(search.held_out)
    named = counted(others, "other")
    return f"{text}; the choice was compared with YaRN on {named}, together {tokens:,} tokens."


def _cost_note(facts: ContextFacts) -> str:
    cost = facts.cost
    if cost is None:
        return "What scaling costs prompts within the original length was not measured."
    measured = f"{cost.tokens:,} tokens of {cost.text} in windows of {cost.context:,}"
    if cost.context > facts.original_length:
        return (
            f"Perplexity changed by {percent(cost.increase, signed=True)} on {measured}; these are longer "
            f"than the {facts.original_length:,} tokens that the source was trained at, so that this is no "
            "figure of what short prompts lose."
        )
    rest = (
        "nothing else was changed"
        if cost.is_all
        else "the quality table holds what quantization and other changes cost as well"
    )
    return (
        "Scaling alone changes perplexity within the original length by "
        f"{percent(cost.increase, signed=True)} ({measured}); {rest}."
    )
