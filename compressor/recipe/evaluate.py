"""The recipe's ``evaluate`` section: what is measured, and what the result must not lose."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic.config import JsonDict

from compressor.recipe.evaluate_long import LongSection
from compressor.recipe.fields import Count, Metric, Seed, Slug, Text, Window, no_bool
from compressor.recipe.section import Section, blamed, is_none

_PERCENT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})? ?%", re.ASCII)
_NUMBER_OR_PERCENT: JsonDict = {"type": ["number", "string"]}


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _percent(value: object) -> object:
    """``'30%'`` as 0.3; numbers as they are."""
    no_bool(value)
    if not isinstance(value, str):
        return value
    if not _PERCENT.fullmatch(value):
        raise ValueError(f"{value!r} is neither a number nor a percentage such as '30%'")
    return float(Decimal(value.rstrip(" %")) / 100)


class EvalTask(Section):
    """An lm-eval task to run on source and result."""

    name: Slug = Field(
        description="The task's name; `piqa` and `openbookqa` run offline from shipped items, any other that "
        "lm-eval knows (a task, group or tag) takes its items from the Hub."
    )
    limit: Count | None = Field(
        default=None, description="Use only the first N items (of each of a group's tasks); all by default."
    )


class Gate(Section):
    """A bound on the loss of quality; beyond it the run ends with exit code 1 and the result kept aside."""

    metric: Metric = Field(
        description="`perplexity`: relative increase of the result's perplexity over the source's. `kl`: "
        "mean Kullback-Leibler divergence from source to result, in nats per token. `task:NAME`: how far "
        "the accuracy on that task of evaluate.tasks may fall; `task`: the same of each of them. `needle`: "
        "of the numbers hidden by evaluate.long.needles. `acceptance`: the share of the tokens proposed by "
        "the draft that the result accepts, as drafts.measure finds it."
    )
    max_increase: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        exclude_if=is_none,
        description="The largest loss that passes: 0.3 or '30%' for perplexity (result at most 1.3 times the "
        "source), nats for kl, 0.02 or '2%' (two points of accuracy) for a task.",
        json_schema_extra=_NUMBER_OR_PERCENT,
    )
    min_recovery: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        exclude_if=is_none,
        description="Instead: the smallest share of the source's figure that passes, 0.99 or '99%': result "
        "over source of an accuracy, source over result of a perplexity; of `acceptance` the share itself.",
        json_schema_extra=_NUMBER_OR_PERCENT,
    )
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] | None = Field(
        default=None,
        exclude_if=is_none,
        description="With it, an interval of this confidence decides: 0.95 or '95%'. PASS where all of it is "
        "within the bound, FAIL where all of it is beyond, else UNCERTAIN. At most 0.999, which is as far as "
        "2,000 draws reach. By default the measured value decides, whatever its interval.",
        json_schema_extra=_NUMBER_OR_PERCENT,
    )
    uncertain: Literal["warn", "fail"] | None = Field(
        default=None,
        exclude_if=is_none,
        description="What UNCERTAIN does: `warn` (the default) exports the result and says how many items "
        "would tell; `fail` keeps it aside.",
    )

    @field_validator("max_increase", mode="before")
    @classmethod
    def _increase(cls, value: object, info: ValidationInfo) -> object:
        found = _percent(value)
        if isinstance(value, str) and info.data.get("metric") == "kl":
            raise ValueError(
                "kl is absolute, in nats per token: write a number such as 0.05, not a percentage"
            )
        return found

    @field_validator("min_recovery", "confidence", mode="before")
    @classmethod
    def _share(cls, value: object) -> object:
        return _percent(value)

    @model_validator(mode="after")
    def _one_bound(self) -> Gate:
        if self.max_increase is None and self.min_recovery is None:
            raise blamed((), "a gate needs a bound: max_increase or min_recovery")
        if self.max_increase is not None and self.min_recovery is not None:
            raise blamed(("min_recovery",), "a gate has one bound: max_increase or min_recovery")
        if self.metric == "kl" and self.min_recovery is not None:
            raise blamed(("min_recovery",), "kl has no recovery: use max_increase, in nats per token")
        if self.metric == "acceptance" and self.max_increase is not None:
            raise blamed(("max_increase",), "acceptance is itself a share: use min_recovery")
        if self.uncertain is not None and self.confidence is None:
            raise blamed(("uncertain",), "without confidence nothing is uncertain: say that too")
        return self


class GenerationSection(Section):
    """Greedy continuations of the evaluation text by source and result: how long they stay the same."""

    prompts: Annotated[Count, Field(le=10_000)] = Field(
        default=16, description="Places of the text that are continued, evenly spaced."
    )
    prompt_tokens: Window = Field(default=64, description="Tokens before each continuation.")
    new_tokens: Annotated[Count, Field(le=2**20)] = Field(default=64, description="Tokens of each.")


class SpeedSection(Section):
    """Decoding with transformers against the clock, source and result by turns."""

    prompt_tokens: Window = Field(default=128, description="Tokens of a prompt.")
    new_tokens: Annotated[Window, Field(le=2**20)] = Field(
        default=64, description="Tokens made after it; the first is timed apart."
    )
    batch: Annotated[Count, Field(le=4096)] = Field(default=1, description="Sequences at once.")
    runs: Annotated[Count, Field(le=1000)] = Field(
        default=5, description="Runs of each that are timed, after one that is not."
    )


class EvaluateSection(Section):
    """What is measured on source and result after the run, and what the result must not exceed."""

    text: Text = Field(
        default="calibration/heldout.jsonl",
        description="Held-out text for perplexity and KL: UTF-8, plain or JSON lines with the field `text`. "
        "Looked for from the current folder, beside the recipe, then among the shipped files. Figures by "
        "domain are those of the field `domain`, else of the first part of `id` (`sotu/1999.txt`: sotu).",
    )
    tokens: Count = Field(default=16384, ge=2, description="How many tokens of it are read.")
    context: Window = Field(
        default=1024, description="Tokens in one window; each window is scored on its own."
    )
    tasks: tuple[Annotated[EvalTask, BeforeValidator(_named, json_schema_input_type=EvalTask | str)], ...] = (
        Field(default=(), description="lm-eval tasks, by name or as {name, limit}.")
    )
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=100)] | None = Field(
        default=None,
        exclude_if=is_none,
        description="Tasks that draw few-shot examples or sample answers are asked with each of these seeds, "
        "and an item counts with its mean; by default once, with the recipe's seed.",
    )
    gates: tuple[Gate, ...] = Field(
        default=(), description="Bounds that decide whether the result is exported."
    )
    long: LongSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="What is measured at long context, beyond the text: by default nothing.",
    )
    generation: GenerationSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="How greedy continuations of both are compared; by default not at all.",
    )
    speed: SpeedSection | None = Field(
        default=None,
        exclude_if=is_none,
        description="How decoding of both is timed on the device at hand; by default not at all.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateSection:
        names = [task.name for task in self.tasks]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise blamed(("tasks", index), f"task {name!r} is listed twice")
        for index, gate in enumerate(self.gates):
            if gate.metric.startswith("task:") and gate.metric[5:] not in names:
                raise blamed(
                    ("gates", index, "metric"), f"no task {gate.metric[5:]!r} in evaluate.tasks to measure"
                )
            if gate.metric == "task" and not names:
                raise blamed(("gates", index, "metric"), "no task in evaluate.tasks to measure")
            if gate.metric == "needle" and (self.long is None or self.long.needles is None):
                raise blamed(("gates", index, "metric"), "evaluate.long.needles hides nothing to be found")
        if self.seeds is not None and len({*self.seeds}) < len(self.seeds):
            raise blamed(("seeds",), "a seed is listed twice")
        return self
