"""Gates: bounds on what a result may lose, and what the measurement says of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any, Literal, Protocol

from compressor.budget.samples import (
    AnswerSample,
    Finding,
    RatioSample,
    Sample,
    ScoreSample,
    TextSample,
)
from compressor.errors import UserError
from compressor.evals.base import EvalResult
from compressor.numerics.paired import FEWEST_UNITS, Answers, Interval, untold_units

TASK = "task:"
# Of intervals that are shown where a gate says none and the value decides.
SHOWN_CONFIDENCE = 0.95
Verdict = Literal["PASS", "FAIL", "UNCERTAIN", "SUSPICIOUS"]


class Gate(Protocol):
    """A bound as the recipe spells it; one of ``max_increase`` and ``min_recovery`` is not None."""

    @property
    def metric(self) -> str:
        """``perplexity``, ``kl``, ``task``, ``task:NAME``, ``needle`` or ``acceptance``."""
        ...

    @property
    def max_increase(self) -> float | None:
        """Relative for perplexity, nats per token for kl, else the share lost (0.02 = two points)."""
        ...

    @property
    def min_recovery(self) -> float | None:
        """The share of the source's figure that must be kept."""
        ...

    @property
    def confidence(self) -> float | None:
        """Of the interval that decides; None where the value decides."""
        ...

    @property
    def uncertain(self) -> str | None:
        """``fail`` where a result that nothing certain is known of is kept aside."""
        ...


@dataclass(frozen=True)
class GateVerdict:
    """One gate and what was measured.

    Attributes:
        metric: as measured: ``task`` stands for each of the tasks.
        max_increase: the bound of the loss, or None.
        min_recovery: the bound of the recovery, or None.
        value: in the units of the bound; NaN where nothing was measured.
        passed: whether the result is exported.
        verdict: what is known.
        confidence: as the gate says.
        interval: of ``value``.
        units: how many were measured.
        unit: what they are.
        needed: where uncertain, how many would tell; None where no number would.
        p_value: of no difference.
        note: what a person must know, or "".
    """

    metric: str
    max_increase: float | None
    min_recovery: float | None
    value: float
    passed: bool
    verdict: Verdict
    confidence: float | None = None
    interval: Interval | None = None
    units: int | None = None
    unit: str = ""
    needed: int | None = None
    p_value: float | None = None
    note: str = ""

    def sentence(self) -> str:
        """The verdict as a person reads it."""
        if self.min_recovery is not None:
            bound = f"at least {self.min_recovery:.4g} of the source's"
        else:
            bound = f"at most {self.max_increase:.4g}"
        found = f"{self.metric}: {self.verdict}: {self.value:.4g}, allowed is {bound}"
        return f"{found}; {self.note}" if self.note else found


def check_gate_metric(
    metric: str, tasks: Collection[str], others: Collection[str] = (), *, where: str = ""
) -> None:
    """Refuses a gate on what will not be measured; needs no measurement.

    Args:
        metric: the gate's.
        tasks: the tasks that will run.
        others: what else will be measured: ``needle``, ``acceptance``.
        where: the gate's place in the recipe.

    Raises:
        UserError: naming what can be gated.
    """
    every = ("task",) if tasks else ()
    known = ("perplexity", "kl", *every, *(f"{TASK}{task}" for task in tasks), *others)
    if metric not in known:
        raise UserError(
            f"no measurement for the gate {metric!r}", where=where, fix=f"measured: {', '.join(known)}"
        )


def gate_samples(result: EvalResult) -> dict[str, Sample]:
    """What each possible gate is held against, by metric; of a task ``acc``, or else its first figure."""
    found: dict[str, Sample] = {}
    if (units := result.text.units) is not None:
        tokens = tuple(float(unit.scored) for unit in units.units)
        more = tuple(unit.nll_result - unit.nll_source for unit in units.units)
        found["perplexity"] = TextSample(units.kind, more, tokens)
        kl = tuple(unit.kl for unit in units.units)
        found["kl"] = RatioSample(units.kind, kl, tokens)
    for task in result.tasks:
        figures = task.metrics[task.main]
        if figures.answers is not None:
            found[TASK + task.name] = AnswerSample("items", figures.answers.counts)
        elif figures.scores is not None:
            better = figures.higher_is_better
            found[TASK + task.name] = ScoreSample("items", *figures.scores, higher_is_better=better)
    if result.long is not None and (needles := result.long.needles):
        right = [[found for cell in needles[whose] for found in cell.right] for whose in ("source", "result")]
        if right[0]:
            found["needle"] = AnswerSample("texts", Answers.of(right[0], right[1]).counts)
    return found


def acceptance_sample(decoding: Mapping[str, Any]) -> dict[str, Sample]:
    """The draft's proposals of every domain at the first batch size (``DecodingResult.to_json``), by prompt.

    Empty where nothing was measured.
    """
    domains = decoding["domains"]
    counted = [
        prompt
        for domain in domains
        if domain["batch"] == domains[0]["batch"]
        for prompt in (domain["drafts"][0].get("prompts", ()) if domain["drafts"] else ())
    ]
    if not counted:
        return {}
    accepted, proposed = (tuple(map(float, part)) for part in zip(*counted, strict=True))
    return {"acceptance": RatioSample("prompts", accepted, proposed)}


def check_gates(gates: Sequence[Gate], samples: Mapping[str, Sample], seed: int = 0) -> list[GateVerdict]:
    """A verdict for each gate, in order; for ``task`` one for each task.

    Args:
        gates: the recipe's.
        samples: ``gate_samples`` of the measurement; empty where nothing could be measured. A gate whose
            metric is missing or NaN does not pass: nothing is known in its favour.
        seed: of the intervals.
    """
    verdicts = []
    for gate in gates:
        metrics = [gate.metric]
        if gate.metric == "task":
            metrics = [metric for metric in samples if metric.startswith(TASK)] or metrics
        verdicts += [_judge(gate, metric, samples.get(metric), seed) for metric in metrics]
    return verdicts


def _judge(gate: Gate, metric: str, sample: Sample | None, seed: int) -> GateVerdict:
    bound = (metric, gate.max_increase, gate.min_recovery)
    kept = gate.min_recovery is not None
    confidence = gate.confidence or SHOWN_CONFIDENCE
    finding = Finding(nan, None)
    if sample is not None:
        finding = sample.recovery(confidence, seed) if kept else sample.loss(confidence, seed)
    if sample is None or isnan(finding.value):
        return GateVerdict(*bound, nan, False, "FAIL", gate.confidence, note="nothing was measured")
    needed, note = None, ""
    verdict = _verdict(gate, finding)
    if verdict == "UNCERTAIN":
        limit = gate.min_recovery if gate.min_recovery is not None else gate.max_increase
        assert limit is not None
        needed = sample.needed(limit, confidence, recovery=kept)
        if needed is not None and sample.units >= FEWEST_UNITS:
            needed = max(needed, untold_units(sample.units, confidence))
        note = _uncertain(sample, needed, finding.interval)
    elif verdict == "SUSPICIOUS":
        note = (
            "better than the source by more than noise: the result has seen this text or these items, or the "
            "source is not measured as it should be"
        )
    return GateVerdict(
        *bound,
        finding.value,
        verdict not in ("FAIL",) and not (verdict == "UNCERTAIN" and gate.uncertain == "fail"),
        verdict,
        gate.confidence,
        finding.interval,
        sample.units,
        sample.unit,
        needed,
        sample.p_value,
        note,
    )


def _verdict(gate: Gate, finding: Finding) -> Verdict:
    """A loss passes up to its bound, a recovery from its bound on."""
    limit, nothing_lost, sign = gate.max_increase, 0.0, 1
    if gate.min_recovery is not None:
        limit, nothing_lost, sign = gate.min_recovery, 1.0, -1
    assert limit is not None
    within = sign * finding.value <= sign * limit
    # Both ends so that larger is worse.
    ends = None if finding.interval is None else sorted(sign * end for end in finding.interval)
    if gate.confidence is not None and (ends is None or ends[0] <= sign * limit < ends[1]):
        return "UNCERTAIN"
    if not within:
        return "FAIL"
    better = ends is not None and ends[1] < sign * nothing_lost
    # What is no difference, such as a divergence or a share accepted, is never better than the source.
    return "SUSPICIOUS" if better and gate.metric not in ("kl", "acceptance") else "PASS"


def _uncertain(sample: Sample, needed: int | None, interval: Interval | None) -> str:
    if interval is None and sample.units >= FEWEST_UNITS:
        return f"too few of {sample.units:,} {sample.unit} differ from the others for an interval"
    if interval is None:
        return f"{sample.units} {sample.unit} are too few for an interval, which takes {FEWEST_UNITS}"
    if needed is None:
        return "what was measured is the bound itself: no number of units would tell"
    return (
        f"{sample.units:,} {sample.unit} are too few to tell; about {needed:,} would, with four chances in "
        "five, if the loss is what was measured"
    )
