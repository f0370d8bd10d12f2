"""What a smoke run did, on stdout."""

from __future__ import annotations

import click

from compressor.planner.plan import Plan
from compressor.report.rows import gate_row
from compressor.smoke.run import Smoke

_NOT_PROVEN = (
    "the quality of the result and the gates (the weights are random); time, memory and disk of the real "
    "run (see `compress plan`); the source's own weights, which were not read; whatever happens in "
    "layers, experts and sizes that were cut away"
)


def print_smoke(plan: Plan, found: Smoke) -> None:
    """Prints what was kept, what ran and how long, and what that does not prove."""
    report = found.report
    click.echo(f"smoke run of {plan.loaded.recipe.name}: done in {found.wall_s:.0f} s\n")
    shown = (f"{change.key} {change.before:,} -> {change.after:,}" for change in found.config.changes)
    _row("source", plan.source.label, plan.source.note)
    _row("model", f"{found.architecture}, random: {found.tensors} tensors, {found.parameters:,} parameters")
    _row("layers", str(found.layers))
    _row("sizes", ", ".join(shown))
    _row("tokenizer", found.tokenizer)
    if found.unmet:
        _row("unmet", f"{', '.join(found.unmet)}: what they match was cut away")
    ran = (f"{stage.name} {stage.wall_s:.1f} s" for stage in report.stages)
    _row("ran", f"{', '.join(ran)}, report")
    stored = (f"{facts.tensors} tensors {label}" for label, facts in report.result.schemes.items())
    kept = sum(left.tensors for left in report.result.left_16bit)
    _row(
        "stored", f"{', '.join(stored)}, {kept} in 16 bit; {report.result.bits_per_weight:.2f} bits a weight"
    )
    if report.quality is not None:
        perplexity, kl = report.quality.perplexity, report.quality.kl
        asked = (
            "" if found.measured else " (the recipe measures nothing; this shows that the result computes)"
        )
        _row(
            "measured",
            f"perplexity {perplexity.source:.1f} -> {perplexity.result:.1f}, KL {kl.mean:.4f}{asked}",
        )
    for gate in report.gates:
        state = "pass" if gate.passed else "fail"
        _, value, allowed, _ = gate_row(gate)
        _row("gate", f"{gate.metric} would {state}: {value}, allowed {allowed}")
    _row("not shown", _NOT_PROVEN, _undrafted(plan, found))


def _undrafted(plan: Plan, found: Smoke) -> str:
    """What of the section ``drafts`` was not tried."""
    section = plan.loaded.recipe.drafts
    if section is None:
        return ""
    if found.report.drafts is None:
        return "the draft, which fits the source only"
    return "" if section.measure is None else "decoding with the draft"


def _row(title: str, *texts: str) -> None:
    click.echo(f"{title:<11}{'; '.join(filter(None, texts))}")
