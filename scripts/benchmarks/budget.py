"""What predicts the loss of a mix: costs from gradients, each group's divergence alone, errors of weights.

Each predictor's costs go through the same exact knapsack at the recipe's budget; the mixes are judged on
calibration rows that no cost was measured on, beside random mixes of as many bytes and each scheme by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.budget.knapsack import Mix, Option, best_mix, random_mix, uniform_mix
from compressor.planner.budgeted import BudgetPlan
from compressor.planner.plan import Plan, make_plan
from compressor.planner.staged import base_source
from compressor.progress import Silent
from compressor.recipe.load import load_recipe
from compressor.stages.budget_judge import Judge
from compressor.stages.budget_spec import COPY, Group, Stored
from compressor.stages.receipts import all_receipts
from compressor.stages.sensitivity import measured_costs, sensitivity_stage
from compressor.stages.tokens import calibration_tokens
from scripts.benchmarks.process import Failed

Costs = Mapping[str, Mapping[str, float]]


def budget(options: argparse.Namespace) -> dict[str, Any]:
    """Rank correlations with the divergence of a group alone, and what each predictor's mix loses."""
    plan = make_plan(load_recipe(options.recipe), output=options.work / "budget" / "result", planning=False)
    planned = plan.budget
    if planned is None or planned.goal.group_bytes is None:
        raise Failed("the recipe has no budget of bits or bytes")
    folder = _sensed(plan, planned)
    job = planned.job
    ids_NT = calibration_tokens(base_source(plan), job.calibration, folder, Silent()).ids_NT
    judged_NT, heard_NT = ids_NT[job.heard :], ids_NT[: min(job.heard, options.divergence_rows)]
    told = (job.groups, job.walk, job.seed, folder, Silent())
    gradient = {name: costs for name, costs in measured_costs(folder).items() if costs is not None}
    groups = [group for group in job.groups if group.name in gradient]
    alone = _divergences(Judge(base_source(plan), heard_NT, *told), groups)
    base = {group.name: group.options[0].name for group in groups}
    predictors: dict[str, Costs] = {
        "gradient x change": gradient,
        # Of the options but the smallest in proportion to the gradients' costs: they are too near to measure.
        "divergence alone": {
            name: {option: alone[name] * cost / costs[base[name]] for option, cost in costs.items()}
            for name, costs in gradient.items()
            if name in alone
        },
        "weight error": _weight_errors(folder, groups),
    }
    judge = Judge(base_source(plan), judged_NT, *told)
    rows = []
    for predictor, costs in predictors.items():
        found = [costs[group.name][base[group.name]] for group in groups]
        correlation = _rank_correlation(found, [alone[group.name] for group in groups])
        mix = best_mix(_priced(groups, costs), planned.goal.group_bytes)
        rows.append(_row(predictor, mix, groups, planned, judge) | {"rank_correlation": correlation})
    priced = _priced(groups, gradient)
    for seed in range(options.rounds):
        mix = random_mix(priced, planned.goal.group_bytes, seed)
        rows.append(_row(f"random {seed}", mix, groups, planned, judge))
    for name in sorted({option.name for group in groups for option in group.options} - {COPY}):
        uniform = uniform_mix(priced, name)
        if uniform is not None:
            rows.append(_row(f"uniform {name}", uniform, groups, planned, judge))
    print(render_budget(rows))
    return {"recipe": options.recipe, "tokens_judged": judged_NT.numel(), "rows": rows}


def render_budget(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of what ``budget`` measured."""
    lines = [
        "| mix by | rank correlation | bits a target weight | KL | perplexity |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        rank = f"{row['rank_correlation']:.3f}" if "rank_correlation" in row else "-"
        bits, loss = f"{row['bits_per_target_weight']:.3f}", f"{row['increase']:+.2%}"
        lines.append(f"| {row['mix']} | {rank} | {bits} | {row['kl']:.4f} | {loss} |")
    return "\n".join(lines)


def _sensed(plan: Plan, planned: BudgetPlan) -> Path:
    """The finished stage ``sensitivity``."""
    key = planned.sensitivity_key(plan.base_source)
    with plan.workspace.locked():
        if not plan.workspace.finished("sensitivity", key):
            folder = plan.workspace.begin("sensitivity", key)
            sensitivity_stage(base_source(plan), planned.job, folder, Silent())
            plan.workspace.publish("sensitivity", key, {})
    return plan.workspace.artefact("sensitivity", key)


def _divergences(judge: Judge, groups: Sequence[Group]) -> dict[str, float]:
    """Group -> KL divergence from the source with it alone in its smallest option."""
    return {group.name: judge.measure({group.name: group.options[0]}, group.name).kl for group in groups}


def _weight_errors(folder: Path, groups: Sequence[Group]) -> Costs:
    """Group -> option -> squared error of its weights."""
    errors = {
        (error["module"], error["scheme"]): error["squared_error"]
        for receipt in all_receipts(folder)
        for error in receipt["errors"]
    }

    def error(group: Group, option: Stored) -> float:
        if option.scheme is None:
            return 0.0
        parts = [part for claim in group.claims for part in claim.role.parts]
        return sum(errors[part.module, option.scheme.label] for part in parts)

    return {group.name: {option.name: error(group, option) for option in group.options} for group in groups}


def _priced(groups: Sequence[Group], costs: Costs) -> list[list[Option]]:
    return [
        [Option(option.name, option.nbytes, costs[group.name][option.name]) for option in group.options]
        for group in groups
    ]


def _row(name: str, mix: Mix, groups: Sequence[Group], planned: BudgetPlan, judge: Judge) -> dict[str, Any]:
    chosen = {group.name: group.options[number] for group, number in zip(groups, mix.chosen, strict=True)}
    found = judge.measure(chosen, name)
    return {
        "mix": name,
        "bits_per_target_weight": planned.goal.bits(mix.nbytes),
        "kl": found.kl,
        "increase": found.increase,
        "increase_ci95": found.increase_ci95,
    }


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    import numpy as np

    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])
