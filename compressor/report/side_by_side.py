"""Several runs of one source side by side: what each gained and lost, and where their layers differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from compressor.report.drafts import measured_passes
from compressor.report.long import kilo
from compressor.report.model import Quality, Report
from compressor.report.parts import LayerMatrix
from compressor.report.words import duration, number, percent, size

LAYER_HEADS = ("matrix",)
GROUPS = ("size", "quality", "tasks", "reach", "speed", "cost")
_LAYERS = 8
# Beyond this, two measurements of the same source on the same text are not the same measurement.
_SAME_PERPLEXITY = 1e-3


@dataclass(frozen=True)
class Run:
    """A run to compare: what it is called here, its source's fingerprint where it is known, its report."""

    name: str
    fingerprint: str | None
    report: Report


@dataclass(frozen=True)
class Row:
    """One measure of all runs.

    Attributes:
        group: one of ``GROUPS``.
        title: of the measure.
        texts: as people read it, run by run; "-" where a run does not have it.
        values: the same as numbers; None where there is none.
        best: indices of the runs that are best; empty where nothing is better, or all are equal.
    """

    group: str
    title: str
    texts: tuple[str, ...]
    values: tuple[float | None, ...]
    best: tuple[int, ...]


@dataclass(frozen=True)
class SideBySide:
    """The comparison.

    Attributes:
        names: of the runs.
        rows: measures that any of them has.
        layers: the matrices whose errors differ most, and scheme and error of each run.
        warnings: where figures are not of the same thing.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    layers: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON holds it; numbers that are not finite are None."""
        told = asdict(self)
        for row in told["rows"]:
            row["values"] = [
                value if value is not None and math.isfinite(value) else None for value in row["values"]
            ]
        return told


@dataclass(frozen=True)
class _Measure:
    """A figure of a report, how it is told, and whether less of it is better; None where neither is."""

    group: str
    title: str
    of: Callable[[Report], float | None]
    told: Callable[[float], str]
    less: bool | None = None


def side_by_side(runs: Sequence[Run]) -> SideBySide:
    """The comparison of two runs or more, of one source (``source_differences``)."""
    told = tuple(_warnings(runs))
    unlike = {group for group, _ in told}
    measures = [
        replace(measure, less=None) if measure.group in unlike else measure
        for measure in (*_MEASURES, *_task_measures(runs))
    ]
    rows = [
        _text_row(runs, "size", "stored as", _schemes),
        *(_value_row(runs, measure) for measure in measures),
        _text_row(runs, "quality", "95% interval of the change", _interval),
        _text_row(runs, "quality", "gates", _gates),
    ]
    rows.sort(key=lambda row: GROUPS.index(row.group))
    return SideBySide(
        names=tuple(run.name for run in runs),
        rows=tuple(row for row in rows if any(text != "-" for text in row.texts)),
        layers=tuple(_layers(runs)),
        warnings=tuple(warning for _, warning in told),
    )


def source_differences(runs: Sequence[Run]) -> list[str]:
    """How the runs' sources differ from the first one's, a sentence for each run; none where it is one.

    Fingerprints decide where both runs have one; else revision, 16-bit bytes and number of weights.
    """
    first = runs[0]
    found = []
    for run in runs[1:]:
        ours, theirs = first.report.source, run.report.source
        if first.fingerprint and run.fingerprint:
            same = first.fingerprint == run.fingerprint
        else:
            same = (ours.revision, ours.bytes, ours.parameters) == (
                theirs.revision,
                theirs.bytes,
                theirs.parameters,
            )
        if not same:
            found.append(
                f"{run.name} was made from {_source(run.report)}, {first.name} from {_source(first.report)}"
            )
    return found


def _source(report: Report) -> str:
    return f"{report.source.label} ({report.source.parameters:,} weights)"


def _warnings(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """(group of rows that do not compare, or "", why): evaluations that differ in what they read or asked."""
    measured = [(run.name, run.report.quality) for run in runs if run.report.quality is not None]
    missing = [run.name for run in runs if run.report.quality is None]
    if missing:
        yield "", f"Quality was not measured: {', '.join(missing)}."
    if len(measured) < 2:
        return
    first_name, first = measured[0]
    for name, quality in measured[1:]:
        assert quality is not None
        assert first is not None
        told = (
            ("text", first.text, quality.text),
            ("tokens", f"{first.tokens:,}", f"{quality.tokens:,}"),
            ("tokens of a window", f"{first.context:,}", f"{quality.context:,}"),
            ("dtype", first.text_dtype, quality.text_dtype),
        )
        differ = [f"{what} {theirs}, not {ours}" for what, ours, theirs in told if ours != theirs]
        if differ:
            yield (
                "quality",
                f"{name} was measured on something else than {first_name}: {'; '.join(differ)}. "
                "Perplexities and divergences do not compare.",
            )
        elif abs(quality.perplexity.source / first.perplexity.source - 1) > _SAME_PERPLEXITY:
            before, after = number(first.perplexity.source, 4), number(quality.perplexity.source, 4)
            yield (
                "quality",
                f"The source's own perplexity is {after} in {name} and {before} in {first_name}: one of them "
                "was measured otherwise.",
            )
        items = [
            f"{task} {theirs:,}, not {ours:,}"
            for task in first.tasks
            if (ours := _items(first, task)) and (theirs := _items(quality, task)) and ours != theirs
        ]
        if items:
            yield "tasks", f"{name} was asked other numbers of items than {first_name}: {'; '.join(items)}."


def _layers(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    """The matrices with the largest difference of errors between any two runs, weighed by their size."""
    at = [{(row.layer, row.matrix): row for row in run.report.weights.layers} for run in runs]
    shared = [key for key in at[0] if all(key in found for found in at[1:])]

    def spread(key: tuple[int | None, str]) -> float:
        errors = [found[key].relative_error for found in at]
        return (max(errors) - min(errors)) * at[0][key].parameters

    ranked = sorted((key for key in shared if spread(key) > 0), key=spread, reverse=True)
    for key in ranked[:_LAYERS]:
        layer, matrix = key
        where = matrix if layer is None else f"layer {layer}: {matrix}"
        yield (where, *(_stored(found[key]) for found in at))


def _stored(row: LayerMatrix) -> str:
    return f"{row.scheme}, {number(row.relative_error, 5)}"


def _value_row(runs: Sequence[Run], measure: _Measure) -> Row:
    values = tuple(measure.of(run.report) for run in runs)
    known = [value for value in values if value is not None and math.isfinite(value)]
    best: tuple[int, ...] = ()
    if measure.less is not None and len(set(known)) > 1:
        top = min(known) if measure.less else max(known)
        best = tuple(index for index, value in enumerate(values) if value == top)
    texts = tuple("-" if value is None else measure.told(value) for value in values)
    return Row(measure.group, measure.title, texts, values, best)


def _text_row(runs: Sequence[Run], group: str, title: str, of: Callable[[Report], str]) -> Row:
    return Row(group, title, tuple(of(run.report) for run in runs), (None,) * len(runs), ())


def _task_measures(runs: Sequence[Run]) -> Iterator[_Measure]:
    """The results' figures of every task metric that any run has."""
    found: dict[tuple[str, str], bool] = {}
    for run in runs:
        for task, metrics in run.report.quality.tasks.items() if run.report.quality else ():
            for metric, figures in metrics.items():
                found[task, metric] = figures.higher_is_better
    for (task, metric), higher in found.items():
        of = partial(_task, task=task, metric=metric)
        yield _Measure("tasks", f"{task} {metric}", of, _digits(4), less=not higher)


def _task(report: Report, task: str, metric: str) -> float | None:
    figures = report.quality.tasks.get(task, {}).get(metric) if report.quality else None
    return figures.result if figures else None


def _items(quality: Quality, task: str) -> int:
    """How many of a task were asked; 0 where none."""
    return max((figures.n for figures in quality.tasks.get(task, {}).values()), default=0)


def _schemes(report: Report) -> str:
    return ", ".join(report.result.schemes) or "16 bit"


def _interval(report: Report) -> str:
    ends = report.quality.perplexity.increase_ci95 if report.quality else None
    return "-" if ends is None else " to ".join(percent(end, signed=True) for end in ends)


def _gates(report: Report) -> str:
    words = [gate.verdict or ("PASS" if gate.passed else "FAIL") for gate in report.gates]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)) or "-"


def _generation(report: Report) -> float | None:
    found = report.quality.generation if report.quality else None
    return found.until_divergence if found else None


def _rate(report: Report) -> float | None:
    found = report.quality.speed if report.quality else None
    return found.result.tokens_per_s.median if found else None


def _passes(report: Report) -> float | None:
    return measured_passes(report.drafts) if report.drafts else None


def _served(report: Report, key: str) -> float | None:
    rows = report.compounding.rows if report.compounding else ()
    return next((row.optimized.value for row in rows if row.key == key), None)


def _digits(digits: int) -> Callable[[float], str]:
    return lambda value: number(value, digits)


def _bytes(value: float) -> str:
    return size(round(value))


def _whole(value: float) -> str:
    return f"{round(value):,}"


def _times(value: float) -> str:
    return f"{number(value, 2)}x"


_MEASURES = (
    _Measure("size", "tensors", lambda run: run.result.bytes, _bytes, less=True),
    _Measure(
        "size", "times smaller", lambda run: run.source.bytes / max(run.result.bytes, 1), _times, less=False
    ),
    _Measure("size", "bits a weight", lambda run: run.result.bits_per_weight, _digits(3), less=True),
    _Measure(
        "size", "bits a target weight", lambda run: run.result.bits_per_target_weight, _digits(3), less=True
    ),
    _Measure(
        "quality",
        "perplexity",
        lambda run: run.quality.perplexity.result if run.quality else None,
        _digits(3),
        less=True,
    ),
    _Measure(
        "quality",
        "change of the perplexity",
        lambda run: run.quality.perplexity.increase if run.quality else None,
        lambda value: percent(value, signed=True),
        less=True,
    ),
    _Measure(
        "quality",
        "KL divergence, mean",
        lambda run: run.quality.kl.mean if run.quality else None,
        _digits(5),
        less=True,
    ),
    _Measure(
        "quality",
        "same next token",
        lambda run: run.quality.top1_agreement if run.quality else None,
        percent,
        less=False,
    ),
    _Measure("quality", "tokens before continuations differ", _generation, _digits(1), less=False),
    _Measure(
        "reach",
        "context, tokens",
        lambda run: run.context.length if run.context else None,
        lambda value: kilo(round(value)),
        less=False,
    ),
    _Measure(
        "reach",
        "KV cache, bytes a token",
        lambda run: run.kv.bytes_per_token if run.kv else None,
        _whole,
        less=True,
    ),
    _Measure("reach", "KV cache, bits", lambda run: run.kv.bits if run.kv else None, _digits(2), less=True),
    _Measure("speed", "tokens a pass", _passes, _digits(2), less=False),
    _Measure("speed", "tokens/s, measured", _rate, _digits(1), less=False),
    _Measure("speed", "tokens/s of each user, computed", partial(_served, key="speed"), _whole, less=False),
    _Measure("speed", "users, computed", partial(_served, key="users"), _whole, less=False),
    _Measure("cost", "time", lambda run: sum(stage.wall_s for stage in run.stages), duration, less=True),
    _Measure(
        "cost",
        "memory at most",
        lambda run: max((stage.peak_rss_bytes for stage in run.stages), default=0),
        _bytes,
        less=True,
    ),
)
