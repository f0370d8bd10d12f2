"""What the evaluation measured beyond one figure for the whole text: domains, continuations, speed, gates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from compressor.report.record import Count, Measure, Ordered, Record

Interval = tuple[Measure, Measure]
Share = Annotated[float, Field(gt=0, lt=1)]
# PASS: the interval is within the bound; FAIL: beyond it; UNCERTAIN: the bound is in the interval;
# SUSPICIOUS: within the bound, but better than the source by more than noise.
Verdict = Literal["PASS", "FAIL", "UNCERTAIN", "SUSPICIOUS"]


class DocumentQuality(Record):
    """Source and result on what was read of one document.

    Attributes:
        name: its ``id``, or its line; of a plain text the file's name.
        domain: see ``DomainQuality``.
        scored_tokens: that were predicted.
        nll_source: mean negative log-likelihood, nats a token.
        nll_result: the same of the result.
        kl_mean: KL(source || result) of the next-token distributions, nats a token.
    """

    name: str
    domain: str
    scored_tokens: Count
    nll_source: Measure
    nll_result: Measure
    kl_mean: Measure


class DomainQuality(Record):
    """Source and result on the documents of one domain.

    Attributes:
        name: the documents' field ``domain``, else the first part of their ids (``sotu/1999.txt``: sotu),
            else the file's name.
        documents: of which something was read.
        scored_tokens: that were predicted.
        perplexity_source: exp of the mean negative log-likelihood in nats.
        perplexity_result: the same of the result.
        increase: perplexity_result / perplexity_source - 1.
        increase_ci95: its 95% interval over documents; None where there are fewer than eight.
        kl_mean: nats a token.
    """

    name: str
    documents: Count
    scored_tokens: Count
    perplexity_source: Measure
    perplexity_result: Measure
    increase: Measure
    increase_ci95: Interval | None
    kl_mean: Measure


class GenerationFacts(Record):
    """Greedy continuations of the same prompts by source and result; an end of text is a token like others.

    Attributes:
        prompts: how many, from the evaluation text.
        prompt_tokens: of each.
        new_tokens: of each continuation.
        until_divergence: mean number of tokens before the first that differs; ``new_tokens`` where none does.
        until_divergence_ci95: its 95% interval over prompts, or None.
        agreeing: fraction of all generated tokens that are the same at the same place.
        identical: fraction of prompts whose continuations are the same to the end.
        lengths: of each prompt, tokens before the first that differs.
        dtype: that both computed in.
    """

    prompts: Count
    prompt_tokens: Count
    new_tokens: Count
    until_divergence: Measure
    until_divergence_ci95: Interval | None
    agreeing: Measure
    identical: Measure
    lengths: tuple[Count, ...]
    dtype: str


class Spread(Record):
    """Several runs of one measurement: median, lowest and highest."""

    median: Measure
    low: Measure
    high: Measure


class SpeedFigures(Record):
    """One model, generating with transformers.

    Attributes:
        first_token_s: seconds from the prompt to its first new token (time to first token).
        tokens_per_s: new tokens of all sequences a second, after the first.
        weight_bytes: of the parameters and buffers as they were held in memory while it ran.
        cache_bytes: of the KV cache when the last token was made.
        peak_device_bytes: the weights, and the most that generating took of the accelerator beyond what lay
            there before; None without one.
    """

    first_token_s: Spread
    tokens_per_s: Spread
    weight_bytes: Count
    cache_bytes: Count
    peak_device_bytes: Count | None


class SpeedFacts(Record):
    """Source and result by turns on the device at hand, with transformers: measured, not computed.

    Attributes:
        device: its name.
        dtype: that both computed in.
        prompt_tokens: of each sequence.
        new_tokens: of each sequence.
        batch: sequences at once.
        runs: timed, each of source and then result, after one of each to warm up.
        source: the source's figures.
        result: those of the result as it was loaded.
        speedup: of the result's decoding over the source's in the same turn.
        runs_compressed: whether the result's weights stay compressed while it computes; False: transformers
            decoded them first, so that speed and memory are those of 16- or 32-bit weights.
    """

    device: str
    dtype: str
    prompt_tokens: Count
    new_tokens: Count
    batch: Count
    runs: Count
    source: SpeedFigures
    result: SpeedFigures
    speedup: Spread
    runs_compressed: bool


class TaskMetric(Record):
    """One metric of one lm-eval task.

    Attributes:
        source: of the source model.
        result: of the compressed model.
        difference: result - source.
        stderr: standard error of ``difference`` over the same items.
        n: items.
        higher_is_better: as the task declares it.
        difference_ci95: 95% interval of ``difference``, paired over items.
        recovery: result / source, or None where the source has nothing or less is better.
        recovery_ci95: its 95% interval, paired over items.
        lost: items that only the source answered rightly; None where answers are more or less right.
        gained: items that only the result answered rightly.
        p_value: of no difference: McNemar's exact test, or None as ``lost``.
        seeds: how many times items were asked, with other draws, and averaged.
    """

    source: Measure
    result: Measure
    difference: Measure
    stderr: Measure
    n: Count
    higher_is_better: bool
    difference_ci95: Interval | None = None
    recovery: Measure | None = None
    recovery_ci95: Interval | None = None
    lost: Count | None = None
    gained: Count | None = None
    p_value: Measure | None = None
    seeds: Count = 1


class Evaluated(Record):
    """What was measured beyond one figure for the whole text.

    Attributes:
        tasks: lm-eval task -> metric -> figures; empty if none ran.
        kl_ci95: 95% interval of the mean KL, or None.
        interval_unit: what the text's intervals are drawn from: ``documents`` or ``windows``; "" of old.
        domains: the text's, in order of appearance; empty where nothing is known of its documents.
        documents: what was read of each.
        generation: greedy continuations of both, or None where not measured.
        speed: of both on the device at hand, or None where not measured.
    """

    tasks: Ordered[dict[str, TaskMetric]]
    kl_ci95: Interval | None = None
    interval_unit: str = ""
    domains: tuple[DomainQuality, ...] = ()
    documents: tuple[DocumentQuality, ...] = ()
    generation: GenerationFacts | None = None
    speed: SpeedFacts | None = None

    @classmethod
    def of(cls, evaluation: Mapping[str, Any]) -> Evaluated:
        """From what ``EvalResult.to_json`` holds."""
        found = {name: evaluation[name] for name in Evaluated.model_fields if name in evaluation}
        found["kl_ci95"] = evaluation["kl"]["mean_ci95"]
        return Evaluated.model_validate_json(json.dumps(found))


class Gate(Record):
    """A limit of the recipe, and what was measured.

    Attributes:
        metric: ``perplexity``, ``kl``, ``task:NAME``, ``needle`` or ``acceptance``.
        max_increase: the largest loss that passes, or None where ``min_recovery`` is the bound.
        value: in the units of the bound: the loss, or the share of the source's figure that is kept.
        passed: whether the result is exported: not where the verdict is FAIL, nor where it is UNCERTAIN and
            the recipe says that this fails.
        min_recovery: the smallest share that passes, or None.
        confidence: of the interval that decides; None where the recipe says none and ``value`` decides.
        verdict: what is known; None in reports from before there were verdicts.
        interval: of ``value``, at ``confidence`` (95% where the recipe says none), or None.
        units: how many of ``unit`` were measured in pairs.
        unit: ``documents``, ``windows``, ``items``, ``texts`` or ``prompts``.
        needed: where UNCERTAIN, about how many units tell, with four chances in five, if the loss is what was
            measured; None where no number would.
        p_value: of no difference at all: McNemar's exact test, where units are right or wrong; else None.
        note: one sentence for people, or "".
    """

    metric: str
    max_increase: Measure | None = None
    value: Measure
    passed: bool
    min_recovery: Measure | None = None
    confidence: Share | None = None
    verdict: Verdict | None = None
    interval: Interval | None = None
    units: Count | None = None
    unit: str = ""
    needed: Count | None = None
    p_value: Measure | None = None
    note: str = ""
