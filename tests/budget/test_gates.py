"""Gates against measurements: what decides, what is uncertain, what is too good."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import exp, inf, isclose, log

import pytest

from compressor.budget.gates import acceptance_sample, check_gate_metric, check_gates, gate_samples
from compressor.budget.samples import (
    AnswerSample,
    RatioSample,
    Sample,
    ScoreSample,
    TextSample,
    sample_from_json,
)
from compressor.errors import UserError
from compressor.evals.base import EvalResult
from compressor.evals.long_record import FoundCell, LongResult
from compressor.evals.task_record import TaskResult, compare_tasks
from compressor.evals.units import Unit, Units
from tests.evals.test_base import TEXT

# Twelve documents: the result needs 0.10 to 0.12 nats a token more.
MORE = TextSample("documents", tuple(100 * (0.10 + 0.02 * (i % 2)) for i in range(12)), (100.0,) * 12)
KL = RatioSample("windows", tuple(10.0 + i % 3 for i in range(12)), (100.0,) * 12)
LOST = AnswerSample("items", (600, 60, 40, 300))


@dataclass(frozen=True)
class _Gate:
    metric: str
    max_increase: float | None = None
    min_recovery: float | None = None
    confidence: float | None = None
    uncertain: str | None = None


def _judged(gate: _Gate, sample: Sample) -> tuple[str, bool]:
    verdict = check_gates([gate], {gate.metric: sample})[0]
    return verdict.verdict, verdict.passed


def test_without_confidence_the_value_decides() -> None:
    """Up to the bound and with it, whatever the interval; it is told all the same."""
    value = KL.loss(0.95, 0).value
    assert _judged(_Gate("kl", value), KL) == ("PASS", True)
    assert _judged(_Gate("kl", value - 1e-9), KL) == ("FAIL", False)
    assert _judged(_Gate("kl", 0.0), RatioSample("windows", (0.0,) * 4, (9.0,) * 4)) == ("PASS", True)
    verdict = check_gates([_Gate("kl", 1.0)], {"kl": KL})[0]
    assert verdict.interval is not None
    assert verdict.interval[0] < verdict.value < verdict.interval[1]
    assert (verdict.confidence, verdict.units, verdict.unit) == (None, 12, "windows")
    assert "at most 1" in verdict.sentence()


def test_with_confidence_the_interval_decides() -> None:
    """All of it within, all of it beyond, or the bound in it; the last as the gate says."""
    increase = exp(0.11) - 1
    for bound, verdict in ((0.2, "PASS"), (0.05, "FAIL"), (increase + 0.001, "UNCERTAIN")):
        gate = _Gate("perplexity", bound, confidence=0.95)
        assert _judged(gate, MORE) == (verdict, verdict != "FAIL")
    gate = _Gate("perplexity", increase + 0.001, confidence=0.95, uncertain="fail")
    assert _judged(gate, MORE) == ("UNCERTAIN", False)
    for bound, verdict in ((0.8, "PASS"), (0.95, "FAIL"), (exp(-0.11), "UNCERTAIN")):
        assert _judged(_Gate("perplexity", None, bound, 0.95), MORE)[0] == verdict


def test_uncertain_never_asks_for_what_it_has() -> None:
    """An interval of twelve documents that does not tell is not told by eleven: at 95%, by twice as many."""
    few = (0.0, 0.0, 271.8, 15.0, 0.0, 2.9, 0.0, 0.0, 0.0, 0.0, 57.1, 0.0)
    sample = RatioSample(
        "documents", few, (100.0, 1e3, 1e3, 100.0, 1e3, 1.0, 10.0, 100.0, 1e3, 1.0, 1e3, 10.0)
    )
    verdict = check_gates([_Gate("kl", 0.5, confidence=0.95)], {"kl": sample}, 4)[0]
    assert verdict.verdict == "UNCERTAIN"
    assert verdict.interval is not None
    assert verdict.needed is not None
    assert 2 * 12 < verdict.needed < 1000


def test_no_interval_of_documents_that_are_alike() -> None:
    """Enough of them, but all but one without any loss: the reason is not their number."""
    sample = RatioSample("documents", (3.0, *(0.0,) * 7), (10.0,) * 8)
    verdict = check_gates([_Gate("kl", 0.5, confidence=0.95)], {"kl": sample})[0]
    assert (verdict.verdict, verdict.interval) == ("UNCERTAIN", None)
    assert "too few of 8 documents differ" in verdict.note


def test_losses_that_no_float_holds() -> None:
    """A broken result fails its gate; an end of an interval beyond all floats is infinite."""
    broken = TextSample("documents", (8000.0, 8010.0, 7990.0, 8000.0), (10.0,) * 4)
    verdict = check_gates([_Gate("perplexity", 0.01, confidence=0.95)], {"perplexity": broken})[0]
    assert (verdict.verdict, verdict.value, verdict.passed) == ("FAIL", inf, False)
    lopsided = TextSample("documents", (0.1, 0.2, -4360.0, -140.0), (1.0, 1.0, 1000.0, 1000.0))
    verdict = check_gates([_Gate("perplexity", None, 0.9, 0.95)], {"perplexity": lopsided}, 1)[0]
    assert verdict.interval is not None
    assert verdict.interval[1] == inf


def test_uncertain_says_how_many_would_tell() -> None:
    """More the nearer the bound is; nothing where it is the value itself; few units have no interval."""

    def needed(bound: float) -> int | None:
        verdict = check_gates([_Gate("task:piqa", None, bound, 0.95)], {"task:piqa": LOST})[0]
        assert verdict.verdict == "UNCERTAIN"
        assert verdict.units == 1000
        assert verdict.p_value is not None
        return verdict.needed

    near, far = needed(0.975), needed(0.99)
    assert near is not None
    assert far is not None
    assert near > far > 1000
    few = TextSample("documents", MORE.more_N[:3], MORE.tokens_N[:3])
    verdict = check_gates([_Gate("perplexity", 0.5, confidence=0.95)], {"perplexity": few})[0]
    assert (verdict.verdict, verdict.needed, verdict.interval) == ("UNCERTAIN", 4, None)
    assert "3 documents are too few for an interval" in verdict.note
    same = AnswerSample("items", (50, 10, 10, 30))
    verdict = check_gates([_Gate("task:x", 0.0, confidence=0.9)], {"task:x": same})[0]
    assert (verdict.verdict, verdict.needed) == ("UNCERTAIN", None)
    assert "no number of units would tell" in verdict.note


def test_better_by_more_than_noise_is_suspicious() -> None:
    """It passes and says so; what only falls by chance does not, nor does what cannot be better."""
    better = TextSample("documents", tuple(-more for more in MORE.more_N), MORE.tokens_N)
    verdict = check_gates([_Gate("perplexity", 0.1)], {"perplexity": better})[0]
    assert (verdict.verdict, verdict.passed) == ("SUSPICIOUS", True)
    assert "better than the source" in verdict.sentence()
    assert _judged(_Gate("perplexity", None, 0.9, 0.95), better)[0] == "SUSPICIOUS"
    assert _judged(_Gate("task:x", 0.1), AnswerSample("items", (500, 10, 50, 440)))[0] == "SUSPICIOUS"
    assert _judged(_Gate("task:x", 0.1), AnswerSample("items", (500, 10, 14, 476)))[0] == "PASS"
    assert _judged(_Gate("acceptance", None, 0.05), KL)[0] == "PASS"


def test_what_was_not_measured_does_not_pass() -> None:
    """A gate without a measurement keeps the result aside; verdicts keep the gates' order."""
    gates = [_Gate("task:piqa", 1.0), _Gate("perplexity", 1.0)]
    verdicts = check_gates(gates, {"perplexity": MORE})
    assert [(verdict.metric, verdict.passed) for verdict in verdicts] == [
        ("task:piqa", False),
        ("perplexity", True),
    ]
    assert verdicts[0].note == "nothing was measured"
    nothing_right = AnswerSample("items", (0, 0, 4, 6))
    assert _judged(_Gate("task:x", None, 0.9), nothing_right) == ("FAIL", False)


def test_a_gate_on_task_stands_for_each_task() -> None:
    """One verdict a task, in their order; without any the gate does not pass."""
    samples = {"perplexity": MORE, "task:a": LOST, "task:b": LOST}
    verdicts = check_gates([_Gate("task", 0.5)], samples)
    assert [verdict.metric for verdict in verdicts] == ["task:a", "task:b"]
    assert [verdict.passed for verdict in check_gates([_Gate("task", 0.5)], {})] == [False]


def test_samples_are_taken_from_the_measurement() -> None:
    """Relative increase, nats, accuracy and answers: unit by unit, and the same again after JSON."""
    units = tuple(Unit(100, 300.0 + i, 310.0 + i, 5.0) for i in range(5))
    text = replace(TEXT, units=Units("windows", units, ()))
    bits = [tuple(bit == "1" for bit in word) for word in ("1101", "1001", "0101")]
    tasks = (
        compare_tasks(TaskResult("piqa", {"acc": bits[0]}), TaskResult("piqa", {"acc": bits[1]})),
        compare_tasks(
            TaskResult("wer", {"wer": (0.5, 0.25, 1.0, 0.0)}, frozenset({"wer"})),
            TaskResult("wer", {"wer": (0.5, 0.5, 1.0, 0.25)}, frozenset({"wer"})),
        ),
    )
    cells = [(FoundCell("needle", 64, 0.5, 4, sum(row), -1.0, row),) for row in (bits[0], bits[2])]
    long = LongResult(None, {"source": cells[0], "result": cells[1]}, {})
    measured = EvalResult(text, "t", tasks, "float32", "float32", "d", "decoded", None, long=long)
    found = gate_samples(measured)
    assert list(found) == ["perplexity", "kl", "task:piqa", "task:wer", "needle"]
    again = {name: sample_from_json(json.loads(json.dumps(kept.to_json()))) for name, kept in found.items()}
    assert again == found
    losses = {name: sample.loss(0.95, 0).value for name, sample in found.items()}
    assert isclose(losses["perplexity"], exp(0.1) - 1)
    assert isclose(losses["kl"], 0.05)
    assert (losses["task:piqa"], losses["task:wer"], losses["needle"]) == (0.25, 0.125, 0.25)
    assert isclose(found["perplexity"].recovery(0.95, 0).value, exp(-0.1))
    assert isclose(found["task:piqa"].recovery(0.95, 0).value, 2 / 3)
    # Errors rose from 1.75 to 2.25.
    assert isclose(found["task:wer"].recovery(0.95, 0).value, 1.75 / 2.25)
    assert isinstance(found["task:wer"], ScoreSample)


def test_acceptance_is_that_of_the_draft_at_the_first_batch_size() -> None:
    """Prompts of every domain; controls and other batch sizes are left out."""

    def domain(name: str, batch: int, *prompts: tuple[int, int]) -> dict[str, object]:
        drafts = [{"prompts": [list(pair) for pair in prompts]}, {"prompts": [[0, 9]]}]
        return {"domain": name, "batch": batch, "drafts": drafts}

    decoding = {"domains": [domain("a", 1, (3, 6), (2, 3)), domain("b", 1, (1, 3)), domain("a", 8, (0, 9))]}
    sample = acceptance_sample(decoding)["acceptance"]
    assert sample == RatioSample("prompts", (3.0, 2.0, 1.0), (6.0, 3.0, 3.0))
    assert sample.recovery(0.95, 0).value == 0.5
    assert acceptance_sample({"domains": [{"domain": "a", "batch": 1, "drafts": []}]}) == {}


def test_the_needed_units_follow_the_bound() -> None:
    """Of a perplexity on the log scale, whichever way the bound is spelled."""
    by_loss = MORE.needed(0.2, 0.95, recovery=False)
    assert by_loss == MORE.needed(1 / 1.2, 0.95, recovery=True)
    # (1.96 + 0.84)^2 deviations of 1.04 nats at 18.2 - 11 nats from the bound: one; never fewer than four.
    assert by_loss == 4
    assert MORE.needed(exp(0.1101) - 1, 0.95, recovery=False) == pytest.approx(
        ((1.96 + 0.8416) * 1.0445 / (100 * (0.1101 - 0.11))) ** 2, rel=1e-3
    )
    assert log(1.2) > 0.11


def test_unknown_metrics_are_refused_with_the_known_ones() -> None:
    """Before anything runs, at the gate's place in the recipe."""
    check_gate_metric("task:piqa", ["piqa"])
    check_gate_metric("task", ["piqa"])
    check_gate_metric("needle", [], ["needle"])
    with pytest.raises(UserError, match=r"gates\.1: .*'loss'\n.*perplexity, kl, task, task:piqa"):
        check_gate_metric("loss", ["piqa"], where="evaluate.gates.1")
    for metric in ("task:piqa", "task", "needle", "acceptance"):
        with pytest.raises(UserError, match=metric):
            check_gate_metric(metric, [])
