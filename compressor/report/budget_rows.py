"""What views show of the choice of schemes under a budget, as plain strings."""

from __future__ import annotations

from collections import Counter

from compressor.report.budget import BudgetFacts
from compressor.report.evaluated import interval_words
from compressor.report.words import number, percent, size

MIX_HEADS = ("mix", "bits a target weight", "bytes", "KL predicted", "KL measured", "perplexity")
CHOICE_HEADS = ("scheme", "groups", "weights", "bytes")


def mix_rows(facts: BudgetFacts) -> list[tuple[str, ...]]:
    """Every mix that was measured, fewest bytes first."""
    return [
        (
            point.kind if point.kind == "chosen" else f"{point.kind} {point.label}",
            number(point.bits_per_target_weight, 3),
            size(point.bytes),
            number(point.predicted_kl, 5),
            "-" if point.kl is None else number(point.kl, 5),
            "-"
            if point.increase is None
            else percent(point.increase, signed=True) + interval_words(point.increase_ci95, signed=True),
        )
        for point in facts.points
    ]


def choice_rows(facts: BudgetFacts) -> list[tuple[str, ...]]:
    """How many groups and weights got which scheme."""
    groups: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    for group in facts.groups:
        groups[group.chosen] += 1
        weights[group.chosen] += group.parameters
        stored[group.chosen] += sum(option.bytes for option in group.options if option.scheme == group.chosen)
    return [
        (scheme, f"{count:,}", f"{weights[scheme]:,}", size(stored[scheme]))
        for scheme, count in groups.most_common()
    ]


def budget_caption(facts: BudgetFacts) -> str:
    """What was asked for, and on what it was decided."""
    cache = f" The KV cache was chosen with the weights: {facts.kv_format}." if facts.kv_format else ""
    return (
        f"Asked for: {facts.goal}. Sensitivities were measured on {facts.tokens_heard:,} tokens of the "
        f"calibration texts, mixes on {facts.tokens_judged:,} others. Random mixes take about as many bytes "
        f"as the chosen one and look at no sensitivities.{cache}"
    )
