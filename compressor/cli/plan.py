"""``compress plan``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from compressor.cli.options import output_option, recipe_argument, set_option, workspace_option


@click.command(name="plan")
@recipe_argument
@set_option
@output_option
@workspace_option
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
def command(
    recipe: str, overrides: tuple[str, ...], output: Path | None, workspace: Path | None, as_json: bool
) -> None:
    """Show what RECIPE will do, make and cost. Reads config and tensor headers only.

    Every fault that can be found before reading weights is found here, all of them at once.
    """
    from compressor.cli.plan_view import print_plan
    from compressor.planner.compounding import compounding_facts
    from compressor.planner.plan import make_plan
    from compressor.recipe.load import load_recipe

    plan = make_plan(load_recipe(recipe, overrides), output=output, workspace=workspace)
    if not as_json:
        print_plan(plan)
        return
    compounding, _ = compounding_facts(plan)
    shown = {
        "name": plan.loaded.recipe.name,
        "source": {
            "label": plan.source.label,
            "kind": plan.source.kind,
            "note": plan.source.note,
            "revision": plan.source.revision,
        },
        "context_scaling": plan.context and plan.context.to_json(),
        "adapters": plan.adapters and plan.adapters.to_json(),
        "drafts": plan.drafts and plan.drafts.to_json(),
        "budget": plan.budget and plan.budget.to_json(),
        "family": plan.family,
        "inferred": plan.inferred,
        "rules": [dataclasses.asdict(row) for row in plan.rows],
        "shards": len(plan.shards),
        **dataclasses.asdict(plan.prediction),
        "calibration": plan.walk
        and {
            "tokens": plan.walk.calibration.tokens,
            "states_bytes": plan.walk.states_bytes,
            **plan.walk.calibration.content,
            **dataclasses.asdict(plan.walk.walk),
        },
        "oneshot": plan.oneshot
        and {
            "tokens": plan.oneshot.calibration.tokens,
            **plan.oneshot.calibration.content,
            "load_bytes": plan.oneshot.load_bytes,
            "held_bytes": plan.oneshot.held_bytes,
        },
        "polish": plan.polish and dataclasses.asdict(plan.polish),
        "kv_cache": {
            "planned": plan.kv and dataclasses.asdict(plan.kv),
            "formats": [dataclasses.asdict(option) for option in plan.kv_options],
        },
        "long_evaluation": plan.long and plan.long.to_json(),
        "compounding": compounding and compounding.model_dump(mode="json"),
        "reload_rss_bytes": plan.reload_rss_bytes,
        "warnings": list(plan.warnings),
    }
    click.echo(json.dumps(shown, indent=2))
