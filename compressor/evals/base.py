"""What evaluation measures, as plain records; ``to_json`` gives the shape that scripts rely on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.evals.generation import GenerationAgreement
    from compressor.evals.kv_record import KvResult
    from compressor.evals.long_record import LongResult
    from compressor.evals.long_spec import LongSpec
    from compressor.evals.speed import SpeedResult
    from compressor.evals.task_record import TaskComparison
    from compressor.evals.units import Units

# lm-eval tasks that run offline: each is calibration/NAME/NAME.yaml with its items beside it. Items of others
# come from the Hub.
SHIPPED_TASKS = ("openbookqa", "piqa")


@dataclass(frozen=True)
class TextResult:
    """Source and result on the same text.

    Attributes:
        perplexity_source: exp of the mean negative log-likelihood in nats.
        perplexity_result: the same of the result.
        increase: perplexity_result / perplexity_source - 1.
        increase_ci95: 95% interval of ``increase``, units drawn again in pairs; None where they are too few.
        kl_mean: KL(source || result) of the next-token distributions, nats per scored token.
        kl_p999: its 99.9th percentile over scored tokens.
        top1_agreement: fraction of scored tokens where both models rank the same token first.
        tokens: tokens of the text that the models read.
        scored_tokens: of these, the ones that were predicted.
        context: tokens of one window.
        windows: how many there were.
        kl_ci95: 95% interval of ``kl_mean``.
        units: the figures by document or window, or None where they were not kept.
        seed: of the intervals.
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
    kl_ci95: tuple[float, float] | None = None
    units: Units | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON-able: ``perplexity``, ``kl``, ``top1_agreement``, ``tokens`` and how they were measured.

        ``documents`` and ``domains`` where anything is known of them.
        """
        documents = self.units.documents if self.units else ()
        return {
            "perplexity": {
                "source": self.perplexity_source,
                "result": self.perplexity_result,
                "increase": self.increase,
                "increase_ci95": self.increase_ci95,
            },
            "kl": {"mean": self.kl_mean, "p999": self.kl_p999, "mean_ci95": self.kl_ci95},
            "top1_agreement": self.top1_agreement,
            "tokens": self.tokens,
            "scored_tokens": self.scored_tokens,
            "context": self.context,
            "windows": self.windows,
            "interval_unit": self.units.kind if self.units else "",
            "domains": self.units.domains(self.seed) if self.units else [],
            "documents": [unit.to_json() for unit in documents],
        }


@dataclass(frozen=True)
class GenerationSpec:
    """Greedy continuations of the evaluation text.

    Attributes:
        prompts: places of the text that are continued, evenly spaced; fewer where the text is short.
        prompt_tokens: before each.
        new_tokens: of each continuation.
    """

    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 64


@dataclass(frozen=True)
class SpeedSpec:
    """Decoding against the clock.

    Attributes:
        prompt_tokens: of each sequence.
        new_tokens: of each sequence, two at least.
        batch: sequences at once.
        runs: that are timed, source and result by turns.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    batch: int = 1
    runs: int = 5


@dataclass(frozen=True)
class EvalSpec:
    """What to measure.

    Attributes:
        text: a plain or ``.jsonl`` file.
        text_label: how reports name it.
        text_is_shipped: whether it is one of the package's own texts.
        tokens: how many of its tokens are read, or None for all.
        context: tokens of one window.
        tasks: lm-eval task -> how many of its items to use, None for all.
        seed: of the intervals.
        long: what to measure at long context, or None.
        seeds: of what tasks draw: few-shot examples, sampled answers; a task that draws is asked with each.
        generation: how greedy continuations are compared, or None.
        speed: how decoding is timed, or None.
    """

    text: Path
    text_label: str
    tokens: int | None
    context: int
    tasks: Mapping[str, int | None] = field(default_factory=dict)
    seed: int = 0
    text_is_shipped: bool = False
    long: LongSpec | None = None
    seeds: tuple[int, ...] = (0,)
    generation: GenerationSpec | None = None
    speed: SpeedSpec | None = None

    @property
    def texts(self) -> dict[str, Path]:
        """The files that are measured on, by how a message names them."""
        long = {} if self.long is None else {"the long evaluation's documents": self.long.documents}
        return {"the evaluation text": self.text} | long


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
        generation: greedy continuations of both, or None where not asked for.
        speed: decoding of both against the clock, or None where not asked for.
        seed: of the intervals.
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
    generation: GenerationAgreement | None = None
    speed: SpeedResult | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """JSON-able: the text's figures at the top, then ``tasks`` by name and how it was measured.

        ``kv`` is a list with a record for each format, empty where none was asked for; ``long``,
        ``generation`` and ``speed`` are there where they were asked for.
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
            **({"generation": self.generation.to_json()} if self.generation else {}),
            **({"speed": self.speed.to_json()} if self.speed else {}),
        }
