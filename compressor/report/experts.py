"""What views say of the tokens that experts were calibrated on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compressor.report.calibration import CalibrationFacts, ExpertCoverage
from compressor.report.words import short_name, some_names

EXPERT_HEADS = ("experts of", "experts", "tokens of one", "starved", "topped up", "never reached")


def expert_rows(facts: CalibrationFacts) -> list[tuple[str, str, str, str, str, str]]:
    """(layer, experts, fewest / median / most tokens, starved, topped up, never reached) of every layer."""
    return [
        (
            layer.name,
            f"{layer.experts:,}",
            f"{layer.tokens[0]:,} / {layer.tokens[1]:,.0f} / {layer.tokens[2]:,}",
            f"{layer.starved:,}",
            f"{layer.topped_up:,}",
            f"{layer.never_reached:,}",
        )
        for layer in facts.experts
    ]


def expert_notes(facts: CalibrationFacts) -> Iterator[str]:
    """Every token reaches every matrix, except those that a router chooses."""
    starved = sum(layer.starved for layer in facts.experts)
    if starved:
        yield _starved_note(facts.experts)
    unscored = [layer.name for layer in facts.experts if not layer.scored]
    if unscored:
        yield (
            f"What the router chooses by could not be heard in {some_names(unscored)}: starved experts there "
            "were topped up with tokens spread evenly over the text, or not at all."
        )
    if any(layer.shared_range for layer in facts.experts):
        text = "Static input scales of experts are of what all experts of their layer were sent"
        yield f"{text}, the starved ones' too." if starved else f"{text}."
    heard = [(matrix.tokens, matrix.name) for matrix in facts.matrices if matrix.tokens is not None]
    reached = [(tokens, name) for tokens, name in heard if 0 < tokens < facts.tokens]
    if reached and not facts.experts:  # llm-compressor's: nothing else is known of them
        tokens, name = min(reached, key=lambda pair: pair[0])
        yield (
            f"Expert matrices that only a part of the tokens reached: {len(reached):,}; "
            f"the fewest tokens: {tokens:,} ({short_name(name)})."
        )
    missed = [matrix.name for matrix in facts.matrices if matrix.tokens == 0 and not matrix.topped_up]
    if missed:
        yield (
            "Expert matrices that no token reached, whose values are not calibrated: "
            f"{len(missed):,}: {some_names(missed)}."
        )


def _starved_note(layers: Sequence[ExpertCoverage]) -> str:
    experts = sum(layer.experts for layer in layers)
    starved = sum(layer.starved for layer in layers)
    never = sum(layer.never_reached for layer in layers)
    enough = " or ".join(map(str, sorted({layer.enough for layer in layers})))
    text = (
        f"Starved experts, sent fewer than {enough} tokens (an eighth of their inputs' width): {starved:,} "
        f"of {experts:,}; {never:,} were sent none."
    )
    topped_up = sum(layer.topped_up for layer in layers)
    if not topped_up:
        return text
    tokens = sum(layer.topped_up_tokens for layer in layers)
    best = ", those with the highest scores for them" if all(layer.scored for layer in layers) else ""
    return (
        f"{text} {topped_up:,} were solved on {tokens:,} tokens more, which the router sent elsewhere{best}; "
        "their output errors count these."
    )
