"""Gates: bounds on what a result may lose."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Protocol

from compressor.errors import UserError
from compressor.evals.base import EvalResult

TASK = "task:"


class Gate(Protocol):
    """A bound as the recipe spells it: ``metric`` may be ``max_increase`` at most."""

    @property
    def metric(self) -> str:
        """``perplexity``, ``kl`` or ``task:NAME``."""
        ...

    @property
    def max_increase(self) -> float:
        """Relative for perplexity, nats per token for kl, accuracy lost (0.02 = two points) for tasks."""
        ...


@dataclass(frozen=True)
class GateVerdict:
    """One gate and what was measured; ``value`` is in the units of ``max_increase``."""

    metric: str
    max_increase: float
    value: float
    passed: bool

    def sentence(self) -> str:
        """The verdict as a person reads it."""
        verb = "within" if self.passed else "beyond"
        return f"{self.metric}: {self.value:.4g} is {verb} the allowed {self.max_increase:.4g}"


def check_gate_metric(metric: str, tasks: Collection[str], *, where: str = "") -> None:
    """Refuses a gate on what will not be measured; needs no measurement.

    Args:
        metric: the gate's.
        tasks: the tasks that will run.
        where: the gate's place in the recipe.

    Raises:
        UserError: naming what can be gated.
    """
    known = ("perplexity", "kl", *(f"{TASK}{task}" for task in tasks))
    if metric not in known:
        raise UserError(
            f"no measurement for the gate {metric!r}", where=where, fix=f"measured: {', '.join(known)}"
        )


def gate_values(result: EvalResult) -> dict[str, float]:
    """What each possible gate is held against: metric -> relative perplexity increase, mean KL in nats per
    token, or the accuracy (``acc``) lost on a task.
    """
    lost = {f"{TASK}{task.name}": -task.metrics["acc"].difference for task in result.tasks}
    return {"perplexity": result.text.increase, "kl": result.text.kl_mean, **lost}


def check_gates(gates: Sequence[Gate], values: Mapping[str, float]) -> list[GateVerdict]:
    """One verdict for each gate, in order.

    Args:
        gates: the recipe's.
        values: ``gate_values`` of the measurement; empty where nothing could be measured. A gate whose
            value is missing or NaN does not pass: nothing is known in its favour.
    """
    verdicts = []
    for gate in gates:
        value = values.get(gate.metric, nan)
        verdicts.append(GateVerdict(gate.metric, gate.max_increase, value, value <= gate.max_increase))
    return verdicts
