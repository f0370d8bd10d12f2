"""Gates against measurements."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import pytest

from compressor.budget.gates import check_gate_metric, check_gates, gate_values
from compressor.errors import UserError
from compressor.evals.base import EvalResult, TaskResult, compare_tasks
from tests.evals.test_base import TEXT


@dataclass(frozen=True)
class _Gate:
    metric: str
    max_increase: float


def test_values_are_losses_in_the_units_of_the_gates() -> None:
    """Relative increase, nats, and accuracy lost: a gain is negative."""
    source = TaskResult("piqa", {"acc": (True, True, False, True), "acc_norm": (True, True, True, True)})
    result = TaskResult("piqa", {"acc": (True, False, False, True), "acc_norm": (True, True, True, True)})
    for tasks, lost in (((source, result), 0.25), ((result, source), -0.25)):
        measured = EvalResult(TEXT, "t", (compare_tasks(*tasks),), "float32", "float32", "d", "decoded", None)
        assert gate_values(measured) == {"perplexity": 0.25, "kl": 0.1, "task:piqa": lost}


@pytest.mark.parametrize(
    ("limit", "value", "passed"),
    [(0.25, 0.25, True), (0.24, 0.25, False), (0.0, -0.1, True), (9.0, nan, False)],
)
def test_a_gate_passes_up_to_its_limit(limit: float, value: float, passed: bool) -> None:
    """Equality passes, NaN never does."""
    verdict = check_gates([_Gate("kl", limit)], {"kl": value})[0]
    assert verdict.passed is passed
    assert ("within" if passed else "beyond") in verdict.sentence()


def test_what_was_not_measured_does_not_pass() -> None:
    """A gate without a value keeps the result aside; verdicts keep the gates' order."""
    gates = [_Gate("task:piqa", 1.0), _Gate("perplexity", 1.0)]
    verdicts = check_gates(gates, {"perplexity": 0.5})
    assert [(verdict.metric, verdict.passed) for verdict in verdicts] == [
        ("task:piqa", False),
        ("perplexity", True),
    ]


def test_unknown_metrics_are_refused_with_the_known_ones() -> None:
    """Before anything runs, at the gate's place in the recipe."""
    check_gate_metric("task:piqa", ["piqa"])
    with pytest.raises(UserError, match=r"gates\.1: .*'loss'\n.*perplexity, kl, task:piqa"):
        check_gate_metric("loss", ["piqa"], where="evaluate.gates.1")
    with pytest.raises(UserError, match="'task:piqa'"):
        check_gate_metric("task:piqa", [])
