"""What evaluation measures, as plain records; ``to_json`` gives the shape that scripts rely on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import comb, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.evals.kv_record import KvResult
    from compressor.evals.long_record import LongResult
    from compressor.evals.long_spec import LongSpec

# lm-eval tasks that run offline: each is calibration/NAME/NAME.yaml with its items beside it.
SHIPPED_TASKS = ("piqa",)


@dataclass(frozen=True)
class TextResult:
    """Source and result on the same text.

    Attributes:
        perplexity_source: exp of the mean negative log-likelihood in nats.
        perplexity_result: the same of the result.
        increase: perplexity_result / perplexity_source - 1.
        increase_ci95: low and high end of the paired bootstrap interval over windows of ``increase``, or
            None where there is one window only.
        kl_mean: KL(source || result) of the next-token distributions, nats per scored token.
        kl_p999: its 99.9th percentile over scored tokens.
        top1_agreement: fraction of scored tokens where both models rank the same token first.
        tokens: tokens of the text that the models read.
        scored_tokens: of these, the ones that were predicted.
        context: tokens of one window.
        windows: how many there were.
    """

    perplexity_source: float
    perplexity_result: float
    increase: float
    increase_ci95: tuple[float, float] | None
    kl_mean: float
    kl_p999: float
    top1_agreement: float
    tokens: int
    scored_tokens: int
    context: int
    windows: int

    def to_json(self) -> dict[str, Any]:
        """JSON-able: ``perplexity``, ``kl``, ``top1_agreement``, ``tokens`` and how they were measured."""
        return {
            "perplexity": {
                "source": self.perplexity_source,
                "result": self.perplexity_result,
                "increase": self.increase,
                "increase_ci95": self.increase_ci95,
            },
            "kl": {"mean": self.kl_mean, "p999": self.kl_p999},
            "top1_agreement": self.top1_agreement,
            "tokens": self.tokens,
            "scored_tokens": self.scored_tokens,
            "context": self.context,
            "windows": self.windows,
        }


@dataclass(frozen=True)
class EvalSpec:
    """What to measure.

    Attributes:
        text: a plain or ``.jsonl`` file.
        text_label: how reports name it.
        text_is_shipped: whether it is one of the package's own texts.
        tokens: how many of its tokens are read, or None for all.
        context: tokens of one window.
        tasks: shipped lm-eval task -> how many of its items to use, None for all.
        seed: of the bootstrap interval.
        long: what to measure at long context, or None.
    """

    text: Path
    text_label: str
    tokens: int | None
    context: int
    tasks: Mapping[str, int | None] = field(default_factory=dict)
    seed: int = 0
    text_is_shipped: bool = False
    long: LongSpec | None = None

    @property
    def texts(self) -> dict[str, Path]:
        """The files that are measured on, by how a message names them."""
        long = {} if self.long is None else {"the long evaluation's documents": self.long.documents}
        return {"the evaluation text": self.text} | long


@dataclass(frozen=True)
class TaskResult:
    """One model on one task.

    Attributes:
        name: the task.
        correct: metric (``acc``, ``acc_norm``) -> whether each item was answered rightly, in item order.
    """

    name: str
    correct: dict[str, tuple[bool, ...]]

    def accuracy(self, metric: str = "acc") -> float:
        """Fraction of items answered rightly."""
        items = self.correct[metric]
        return sum(items) / len(items)


@dataclass(frozen=True)
class MetricComparison:
    """One metric of one task, source against result on the same items.

    Attributes:
        source: accuracy of the source.
        result: accuracy of the result.
        difference: result - source.
        stderr: standard error of ``difference``, paired over items.
        n: items.
        lost: items that only the source answered rightly.
        gained: items that only the result answered rightly.
        p_value: exact two-sided McNemar test of ``lost`` against ``gained`` (McNemar 1947).
    """

    source: float
    result: float
    difference: float
    stderr: float
    n: int
    lost: int
    gained: int
    p_value: float


@dataclass(frozen=True)
class TaskComparison:
    """One task, all its metrics; higher is better in each."""

    name: str
    metrics: dict[str, MetricComparison]

    def to_json(self) -> dict[str, Any]:
        """Metric -> its figures."""
        return {
            metric: {
                "source": figures.source,
                "result": figures.result,
                "difference": figures.difference,
                "stderr": figures.stderr,
                "n": figures.n,
                "lost": figures.lost,
                "gained": figures.gained,
                "p_value": figures.p_value,
                "higher_is_better": True,
            }
            for metric, figures in self.metrics.items()
        }


@dataclass(frozen=True)
class EvalResult:
    """Everything measured on one pair of models.

    Attributes:
        text: figures on the text.
        text_label: how reports name the text.
        tasks: one comparison for each task, in the order asked for.
        text_dtype: the dtype that the models computed in on the text.
        task_dtype: the same on the tasks.
        device: where, in words.
        loaded_via: how the result was read back (``compressor.model.load.LoadedCheckpoint.via``).
        activations_simulated: whether activations were quantized as the scheme says; None where it leaves
            them alone.
        kv: the result with each KV-cache format that was asked for, against itself with a 16-bit cache.
        long: source and result at long context, or None where not asked for.
    """

    text: TextResult
    text_label: str
    tasks: tuple[TaskComparison, ...]
    text_dtype: str
    task_dtype: str
    device: str
    loaded_via: str
    activations_simulated: bool | None
    kv: tuple[KvResult, ...] = ()
    long: LongResult | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able: the text's figures at the top, then ``tasks`` by name and how it was measured.

        ``kv`` is a list with a record for each format, empty where none was asked for; ``long`` is there
        where it was asked for.
        """
        return {
            **self.text.to_json(),
            "text": self.text_label,
            "tasks": {task.name: task.to_json() for task in self.tasks},
            "text_dtype": self.text_dtype,
            "task_dtype": self.task_dtype,
            "device": self.device,
            "loaded_via": self.loaded_via,
            "activations_simulated": self.activations_simulated,
            "kv": [measured.to_json() for measured in self.kv],
            **({"long": self.long.to_json()} if self.long else {}),
        }


def compare_tasks(source: TaskResult, result: TaskResult) -> TaskComparison:
    """Source against result, item by item; both must have run on the same items."""
    assert source.name == result.name
    assert source.correct.keys() == result.correct.keys()
    metrics = {metric: _paired(source.correct[metric], result.correct[metric]) for metric in source.correct}
    return TaskComparison(source.name, metrics)


def _paired(source: Sequence[bool], result: Sequence[bool]) -> MetricComparison:
    assert len(source) == len(result) > 0
    n = len(source)
    lost = sum(before and not after for before, after in zip(source, result, strict=True))
    gained = sum(after and not before for before, after in zip(source, result, strict=True))
    difference = (gained - lost) / n
    # Each item's difference is -1, 0 or 1: its second moment is the fraction of discordant items.
    variance = (lost + gained) / n - difference**2
    return MetricComparison(
        source=sum(source) / n,
        result=sum(result) / n,
        difference=difference,
        stderr=sqrt(max(variance, 0.0) / max(n - 1, 1)),
        n=n,
        lost=lost,
        gained=gained,
        p_value=_mcnemar(lost, gained),
    )


def _mcnemar(lost: int, gained: int) -> float:
    """Two-sided binomial test of ``lost`` out of ``lost + gained`` at one half, in exact integers."""
    discordant = lost + gained
    tail = sum(comb(discordant, count) for count in range(min(lost, gained) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**discordant)))
