"""Searches the factors of LongRoPE for one model, and accepts them only where they beat YaRN.

One model is loaded; only its rotary modules change from candidate to candidate. Each is scored on long
documents: past the original length by the objective, within it by what the first tokens lose. The best that
costs short texts no more than YaRN is compared with YaRN on other documents. Scores are written as they come,
so that a killed search goes on and, on a CPU, ends with the same bits.

Legend: N documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from compressor.checkpoint.base import Source
from compressor.errors import UserError
from compressor.progress import Progress
from compressor.rope.scaled import scaled_config
from compressor.rope.search import Candidate, Measured, SearchSpace, best_first, children, chosen
from compressor.rope.search_spec import SearchSpec
from compressor.rope.spec import ContextSpec
from compressor.stages.context_record import ScoreRecord
from compressor.stages.context_scores import (
    Score,
    ScoredText,
    Scorer,
    check_finite,
    needle_texts,
    past_texts,
)
from compressor.stages.context_texts import search_texts
from compressor.stages.tokens import source_tokenizer

RECORD_NAME = "search.json"
# Of what scores mean: the record of another version is not gone on with.
_VERSION = 1
# Nats by which the choice stays below the limit of short texts on the documents of the search, so that it
# keeps the limit on others.
_SPARE = 0.002
_RESAMPLES = 2000
# Between the seeds of generations, so that searches with neighbouring seeds share none.
_SEED_STRIDE = 100_003


@dataclass(frozen=True)
class Found:
    """What the search comes to.

    Attributes:
        context: what is to be written: ``longrope`` with the factors that were found, or YaRN.
        accepted: whether it is the former.
        reason: a sentence for people.
        facts: for the report, JSON-able. ``yarn``, ``best`` and each of ``generations`` hold ``long`` and
            ``short`` (nats a token), ``origin``, ``critical``, ``attention_factor`` and ``factors``;
            ``tried`` counts candidates; ``held_out`` is the comparison on other documents, or None.
    """

    context: ContextSpec
    accepted: bool
    reason: str
    facts: dict[str, Any]


def search_factors(
    source: Source, context: ContextSpec, search: SearchSpec, folder: Path, progress: Progress
) -> Found:
    """The factors of a model, or YaRN where none are better.

    Args:
        source: the checkpoint, not scaled.
        context: what is asked, of method ``longrope`` without factors.
        search: how.
        folder: exists; the record of scores lies there, and a search that is begun again goes on from it.
        progress: told candidates, the best so far and YaRN's score.

    Raises:
        UserError: LongRoPE does not fit the model, or the documents are too few, too short or unreadable.
        CheckpointError: the model or its tokenizer cannot be loaded, or its positions not be changed.
    """
    space = SearchSpace.of(source.config, context)
    run = _Run(source, context, search, space, folder, progress)
    yarn = run.score_yarn("search")
    check_finite(yarn, source.label)
    limit = yarn.short + search.short_slack - _SPARE
    measured, generations = _evolve(run, yarn, limit)
    progress.finish()
    best = chosen(measured[1:], limit)
    facts = {
        "objective": search.objective,
        "original_length": space.original_length,
        "factor": space.factor,
        "seed": search.seed,
        "tried": len(measured),
        "yarn": _facts(measured[0]),
        "best": None if best is None else _facts(best),
        "generations": generations,
        "documents": [len(text_T) for text_T in run.texts.search],
        "held_out": None,
    }
    if best is None or best.long >= yarn.long:
        reason = _nothing(best, yarn, len(measured))
        progress.log(f"context.search: {reason}")
        return Found(run.yarn, False, reason, facts)
    held_out = _compare(run, best.candidate)
    accepted = bool(held_out["difference"] < 0 and held_out["short_difference"] <= search.short_slack)
    reason = _verdict(held_out, accepted, space.original_length)
    progress.log(f"context.search: {reason}")
    found = best.candidate.context(context) if accepted else run.yarn
    return Found(found, accepted, reason, facts | {"held_out": held_out})


def yarn_context(source: Source, context: ContextSpec, space: SearchSpace) -> ContextSpec:
    """YaRN for the same lengths; as factors for families that read no other scaling than longrope."""
    plain = replace(context, method="yarn", factors=None, attention_factor=None)
    try:
        scaled_config(source.config, plain)
    except UserError:
        return space.seeds()[0].context(context)
    return plain


class _Run:
    """One search: its texts, scores and record.

    Attributes:
        spec: how it searches.
        space: what it searches.
        yarn: YaRN for the same lengths.
        texts: the documents.
        progress: told what happens.
    """

    def __init__(
        self,
        source: Source,
        context: ContextSpec,
        spec: SearchSpec,
        space: SearchSpace,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.spec, self.space, self.progress = spec, space, progress
        self._source, self._context = source, context
        self.yarn = yarn_context(source, context, space)
        tokenizer = source_tokenizer(source, folder)
        original = space.original_length
        documents = search_texts(
            tokenizer,
            spec,
            original_length=original,
            target_length=context.target_length,
            progress=progress,
        )
        self.texts = documents
        self._parts: dict[str, Sequence[ScoredText]] = {
            "search": past_texts(documents.search, documents.first, original),
            "accept": past_texts(documents.accept, documents.first, original),
        }
        if spec.objective == "needle":
            for part, name in (("search", "search"), ("accept", "accept needles")):
                self._parts[name] = needle_texts(tokenizer, self._parts[part], spec)
        self._scorer = Scorer(source, progress)
        self._record = ScoreRecord(folder / RECORD_NAME, self._key())

    def _key(self) -> str:
        """Of everything that a score depends on but the factors."""
        told = [_VERSION, self._source.fingerprint, asdict(self._context), self.spec.content, _device()]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def measures_needles(self) -> bool:
        """Whether numbers are hidden in the documents."""
        return "accept needles" in self._parts

    def score(self, candidate: Candidate, part: str) -> Score:
        """Of one candidate on some of the documents."""
        return self._score(candidate.context(self._context), part)

    def score_yarn(self, part: str) -> Score:
        """Of YaRN."""
        return self._score(self.yarn, part)

    def _score(self, context: ContextSpec, part: str) -> Score:
        name = hashlib.sha256(json.dumps([part, asdict(context)]).encode()).hexdigest()[:20]
        known = self._record.read(name)
        if known is None:
            known = self._scorer.score(scaled_config(self._source.config, context).config, self._parts[part])
            self._record.add(name, known)
        return known


def _device() -> str:
    """What computes decides the scores: a record of another kind of device is not gone on with."""
    from compressor.device import pick_device

    return pick_device().type


def _evolve(run: _Run, yarn: Score, limit: float) -> tuple[list[Measured], list[dict[str, Any]]]:
    """All that was tried, YaRN first, and the best of each generation."""
    spec, space = run.spec, run.space
    seeds = space.seeds()
    measured = [Measured(seeds[0], yarn.long, yarn.short)]
    run.progress.start("search", len(seeds) + spec.generations * spec.children, "items", 1)
    generations = []
    new = seeds[1:]
    for generation in range(spec.generations + 1):
        for candidate in new:
            score = run.score(candidate, "search")
            measured.append(Measured(candidate, score.long, score.short))
            best = best_first(measured, limit)[0]
            run.progress.advance(
                1,
                f"generation {generation} of {spec.generations}: best {best.long:.4f}, YaRN {yarn.long:.4f}",
            )
        ranked = best_first(measured, limit)
        generations.append({"generation": generation} | _facts(ranked[0]))
        new = children(
            space,
            [one.candidate for one in ranked[: spec.children]],
            [one.candidate for one in measured],
            count=spec.children,
            seed=spec.seed * _SEED_STRIDE + generation,
        )
    return measured, generations


def _facts(one: Measured) -> dict[str, Any]:
    told = asdict(one.candidate) | {"long": one.long, "short": one.short}
    return told | {"factors": list(one.candidate.factors)}


def _compare(run: _Run, candidate: Candidate) -> dict[str, Any]:
    """The candidate beside YaRN on documents that the search has not seen."""
    found, yarn = run.score(candidate, "accept"), run.score_yarn("accept")
    differences = [one - other for one, other in zip(found.long_N, yarn.long_N, strict=True)]
    facts = {
        "tokens": [len(text_T) for text_T in run.texts.accept],
        "long": list(found.long_N),
        "short": list(found.short_N),
        "yarn_long": list(yarn.long_N),
        "yarn_short": list(yarn.short_N),
        "difference": found.long - yarn.long,
        "difference_ci95": bootstrap(differences, run.spec.seed),
        "short_difference": found.short - yarn.short,
    }
    if run.measures_needles:
        facts["needle"] = run.score(candidate, "accept needles").long
        facts["yarn_needle"] = run.score_yarn("accept needles").long
    return facts


def bootstrap(differences_N: Sequence[float], seed: int) -> list[float] | None:
    """95% percentile interval of the mean, documents drawn anew; None for fewer than two."""
    count = len(differences_N)
    if count < 2:
        return None
    draw = Random(seed)
    means = sorted(sum(draw.choice(differences_N) for _ in range(count)) / count for _ in range(_RESAMPLES))
    return [means[round(share * (_RESAMPLES - 1))] for share in (0.025, 0.975)]


def _nothing(best: Measured | None, yarn: Score, tried: int) -> str:
    if best is None:
        return f"YaRN is used: each of {tried} candidates costs short texts more"
    return (
        f"YaRN is used: the best of {tried} candidates that costs short texts no more scores "
        f"{best.long:.4f} nats a token on the search's documents, YaRN {yarn.long:.4f}"
    )


def _verdict(held_out: dict[str, Any], accepted: bool, original_length: int) -> str:
    count = len(held_out["tokens"])
    spread = held_out["difference_ci95"]
    within = "" if spread is None else f" (95%: {spread[0]:+.4f} to {spread[1]:+.4f})"
    documents = f"{count} held-out document{'s' if count > 1 else ''}"
    compared = (
        f"on {documents} they are at {held_out['difference']:+.4f} nats a token from YaRN past "
        f"{original_length:,} tokens{within}, and at {held_out['short_difference']:+.4f} within them"
    )
    used = "the factors found are used" if accepted else "YaRN is used, not the factors found"
    return f"{used}: {compared}"
