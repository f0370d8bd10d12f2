"""How schemes were chosen: every group's options, the choice, and what other mixes would lose."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compressor.report.record import Count, Measure, Record


class BudgetOption(Record):
    """One way to store a group.

    Attributes:
        scheme: as recipes spell it; ``copy`` is 16 bit.
        bytes: of the group's tensors, scales included.
        cost: nats a token that it adds to the KL divergence from the source, as predicted; None where the
            group could not be measured.
    """

    scheme: str
    bytes: Count
    cost: Measure | None


class BudgetGroup(Record):
    """Matrices that must be stored alike; ``chosen`` is the scheme of one of the ``options``."""

    name: str
    parameters: Count
    chosen: str
    options: tuple[BudgetOption, ...]


class BudgetPoint(Record):
    """One mix.

    Attributes:
        kind: ``chosen``: what the result is stored as; ``uniform``: one scheme for all groups; ``random``: a
            mix of about as many bytes that looks at no sensitivities; ``tried``: met on the way.
        label: what tells it apart: the scheme, or the seed.
        bytes: of all tensors of the result.
        bits_per_target_weight: see ``ResultFacts``.
        predicted_kl: sum of the options' costs, nats a token.
        kl: measured on the judging rows, nats a token; None where it was not.
        increase: relative, of the perplexity there; None where it was not measured.
        increase_ci95: its 95% interval over rows.
    """

    kind: Literal["chosen", "uniform", "random", "tried"]
    label: str
    bytes: Count
    bits_per_target_weight: Measure
    predicted_kl: Measure
    kl: Measure | None
    increase: Measure | None
    increase_ci95: tuple[Measure, Measure] | None


class FrontierPoint(Record):
    """The best mix of one size, as predicted; fields as of ``BudgetPoint``."""

    bytes: Count
    bits_per_target_weight: Measure
    predicted_kl: Measure


class CacheTrade(Record):
    """The best mix beside one format of the KV cache, in the memory that both share.

    Attributes:
        format: of the cache.
        cache_bytes: at the stated context and users.
        cache_kl: what the format adds, as predicted, nats a token.
        bytes: of all tensors of the result; further fields as of ``BudgetPoint``.
    """

    format: str
    cache_bytes: Count
    cache_kl: Measure
    bytes: Count
    bits_per_target_weight: Measure
    predicted_kl: Measure


class BudgetFacts(Record):
    """The choice of schemes.

    Attributes:
        goal: the recipe's words (``bits_per_target_weight: 4.75``).
        tokens_heard: that sensitivities were measured on.
        tokens_judged: other tokens of the calibration text, that mixes were measured on.
        groups: in the order of the checkpoint.
        points: mixes that were measured, fewest bytes first.
        frontier: best mixes of other sizes, fewest bytes first.
        kv_format: of the KV cache, where it was chosen with the weights; else None.
        caches: what each format of the cache would have left for the weights; none unless it was chosen.
    """

    goal: Annotated[str, Field(min_length=1)]
    tokens_heard: Count
    tokens_judged: Count
    groups: tuple[BudgetGroup, ...]
    points: tuple[BudgetPoint, ...]
    frontier: tuple[FrontierPoint, ...]
    kv_format: str | None = None
    caches: tuple[CacheTrade, ...] = ()
