"""Long context in a report: likelihood by position, numbers that were found again, RULER."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from compressor.report.record import Count, Measure, Record
from compressor.report.words import counted, number, percent

LONG_HEADS = ("tokens before", "source", "sliding window", "result", "result - reference", "95%")
FOUND_HEADS = ("hidden", "tokens", "source", "result", "result by depth")
RULER_HEADS = ("RULER task", "tokens", "source", "result", "samples")
_SOURCE: Final = "source"
_SLIDING: Final = "sliding"
_RESULT: Final = "result"
_KILO = 1024

_Whose = Literal["source", "sliding", "result"]
_Model = Literal["source", "result"]
_Tokens = Annotated[int, Field(ge=2, le=2**31)]


class LongChange(Record):
    """A mean minus the reference's, nats a token; a paired 95% interval over documents, or None."""

    mean: Measure
    ci95: tuple[Measure, Measure] | None


class LongBucket(Record):
    """Tokens that ``start`` to ``stop - 1`` tokens of their document come before.

    Attributes:
        nll: ``source``, ``sliding`` or ``result`` -> mean negative log-likelihood, nats a token.
        change: the same -> its difference from the reference.
    """

    start: Count
    stop: Count
    nll: dict[_Whose, Measure]
    change: dict[_Whose, LongChange]


class LongCurve(Record):
    """Means of equal parts of the documents: their middles, and by name the means."""

    position: tuple[Count, ...]
    nll: dict[_Whose, tuple[Measure, ...]]

    @model_validator(mode="after")
    def _as_long(self) -> LongCurve:
        if any(len(means) != len(self.position) for means in self.nll.values()):
            raise ValueError("there must be a mean for every position")
        return self


class LongText(Record):
    """Likelihood by position.

    Attributes:
        documents: their names.
        tokens: of each.
        reference: what ``change`` is against: ``sliding``, or ``source`` within the trained length.
        window: of the sliding window, or None without one.
        stride: by which it slides.
        dtype: that the models computed in.
    """

    documents: tuple[str, ...]
    tokens: _Tokens
    reference: str
    window: Count | None
    stride: Count | None
    dtype: str
    buckets: tuple[LongBucket, ...]
    curve: LongCurve


class FoundCell(Record):
    """Numbers of one kind at one depth of texts of one length: how many texts, how many answers found.

    ``right``: of each text, whether it was; empty in reports from before it was kept.
    """

    kind: Literal["passkey", "needle"]
    tokens: _Tokens
    depth: Annotated[float, Field(ge=0, le=1)]
    trials: Annotated[int, Field(ge=1)]
    found: Count
    logprob: Measure
    right: tuple[bool, ...] = ()


class RulerScore(Record):
    """One RULER task at one length: mean fraction of the wanted strings that answers have."""

    task: str
    tokens: Count
    samples: Count
    score: Measure


class LongFacts(Record):
    """What was measured at long context.

    Attributes:
        text: by position, or None.
        needles: ``source`` or ``result`` -> cells; empty where nothing was hidden.
        ruler: the same of RULER.
        documents_label: the file of documents.
    """

    text: LongText | None
    needles: dict[_Model, tuple[FoundCell, ...]]
    ruler: dict[_Model, tuple[RulerScore, ...]]
    documents_label: str


def long_facts(measured: Mapping[str, Any]) -> LongFacts:
    """The report's part of what ``evals.long_record.LongResult.to_json`` gives."""
    return LongFacts.model_validate_json(json.dumps(measured))


def long_tables(facts: LongFacts) -> list[tuple[tuple[str, ...], list[tuple[str, ...]], int]]:
    """Tables that have something in them: heads, rows, and how many columns are words."""
    tables = [
        (LONG_HEADS, long_rows(facts.text) if facts.text else [], 1),
        (FOUND_HEADS, found_rows(facts), 1),
        (RULER_HEADS, ruler_rows(facts), 1),
    ]
    return [(heads, rows, left) for heads, rows, left in tables if rows]


def long_rows(text: LongText) -> list[tuple[str, ...]]:
    """By position; a column of what was not measured has hyphens."""
    made: list[tuple[str, ...]] = []
    for bucket in text.buckets:
        change = bucket.change.get(_RESULT)
        interval = change.ci95 if change else None
        made.append(
            (
                f"{kilo(bucket.start)} to {kilo(bucket.stop)}",
                *(
                    number(bucket.nll[name], 3) if name in bucket.nll else "-"
                    for name in (_SOURCE, _SLIDING, _RESULT)
                ),
                f"{change.mean:+.3f}" if change else "-",
                f"{interval[0]:+.3f} to {interval[1]:+.3f}" if interval else "-",
            )
        )
    return made


def long_caption(facts: LongFacts) -> str:
    """How it was measured."""
    return " ".join(said for said in (_text_caption(facts), _found_caption(facts)) if said)


def _text_caption(facts: LongFacts) -> str:
    text = facts.text
    if text is None:
        return ""
    count = len(text.documents)
    said = (
        f"Mean negative log-likelihood, nats a token (less is better), of {counted(count, 'document')} of "
        f"{text.tokens:,} tokens{' each' if count > 1 else ''} ({facts.documents_label}), in {text.dtype}."
    )
    if text.window is not None and text.stride is not None:
        said += (
            f" Sliding window: the source, never scaled, reads windows of {text.window:,} tokens that move "
            f"by {text.stride:,}: each token past the first window sees {text.window - text.stride:,} to "
            f"{text.window - 1:,} tokens before it."
        )
    said += f" The reference is {'the sliding window' if text.reference == _SLIDING else 'the source'}."
    if count > 1:
        said += " Intervals are of documents drawn again, in pairs."
    return said


def _found_caption(facts: LongFacts) -> str:
    if not any(facts.needles.values()):
        return ""
    return (
        "Hidden numbers: found of asked for; one is found where greedy decoding begins with it. Depth 0 is "
        "the beginning of the text."
    )


def found_rows(facts: LongFacts) -> list[tuple[str, ...]]:
    """Found of all by kind and length; by depth for the result."""
    made: list[tuple[str, ...]] = []
    for kind, tokens in places(facts):
        cells = {name: cells_at(facts, name, kind, tokens) for name in facts.needles}
        by_depth = ", ".join(f"{cell.depth:g}: {cell.found}/{cell.trials}" for cell in cells.get(_RESULT, ()))
        totals = [
            f"{sum(cell.found for cell in of)} of {sum(cell.trials for cell in of)}"
            for of in (cells.get(_SOURCE, ()), cells.get(_RESULT, ()))
        ]
        made.append((kind, f"{tokens:,}", *totals, by_depth))
    return made


def ruler_rows(facts: LongFacts) -> list[tuple[str, ...]]:
    """Scores of both by task and length."""
    sources = {(score.task, score.tokens): score for score in facts.ruler.get(_SOURCE, ())}
    made: list[tuple[str, ...]] = []
    for score in facts.ruler.get(_RESULT, ()):
        source = sources.get((score.task, score.tokens))
        before = percent(source.score) if source else "-"
        made.append((score.task, f"{score.tokens:,}", before, percent(score.score), str(score.samples)))
    return made


def places(facts: LongFacts) -> list[tuple[str, int]]:
    """Kinds and lengths of the hidden numbers, in order."""
    return list(dict.fromkeys((cell.kind, cell.tokens) for cells in facts.needles.values() for cell in cells))


def cells_at(facts: LongFacts, name: _Model, kind: str, tokens: int) -> tuple[FoundCell, ...]:
    """One model's cells of a kind and length, by depth."""
    found = [cell for cell in facts.needles[name] if (cell.kind, cell.tokens) == (kind, tokens)]
    return tuple(sorted(found, key=lambda cell: cell.depth))


def kilo(tokens: int) -> str:
    """``8K`` for 8,192; what is no multiple of 1,024, in full."""
    return f"{tokens // _KILO}K" if tokens and tokens % _KILO == 0 else f"{tokens:,}"
