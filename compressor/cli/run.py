"""``compress run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compressor.cli.options import (
    log_json_option,
    output_option,
    quiet_option,
    recipe_argument,
    set_option,
    workspace_option,
)

if TYPE_CHECKING:
    from compressor.recipe.load import LoadedRecipe


@click.command(name="run")
@recipe_argument
@set_option
@output_option
@workspace_option
@click.option("--fresh", is_flag=True, help="Do finished stages again.")
@click.option(
    "--smoke",
    is_flag=True,
    help="Try the recipe on a small random model of the source's shape; writes no output.",
)
@click.option(
    "--allow-code",
    is_flag=True,
    help="Import and call what the recipe names as model.factory, code of an installed package.",
)
@quiet_option
@log_json_option
def command(
    recipe: str,
    overrides: tuple[str, ...],
    output: Path | None,
    workspace: Path | None,
    fresh: bool,
    smoke: bool,
    allow_code: bool,
    quiet: bool,
    log_json: bool,
) -> None:
    """Run RECIPE and print what it gained and lost.

    RECIPE is a file, or the path of a shipped one (see `compress recipes`). A killed or interrupted run goes
    on where it was when the same command is given again. If a gate fails, the result is kept aside in the
    output folder's name with .gate-failed, and the exit status is 1.

    With --smoke the plan is made as ever, from the source's headers; then all stages run on a random model
    with small widths and a layer of every kind that the source has, on few tokens, in about a minute. Gates
    are shown, not enforced. The output folder and what a run would resume from are not touched.
    """
    if smoke and fresh:
        raise click.UsageError("--fresh has no effect with --smoke, which keeps nothing to resume")
    from compressor.cli.progress import reporter
    from compressor.planner.plan import make_plan
    from compressor.recipe.load import load_recipe
    from compressor.report.terminal import print_report, report_console
    from compressor.runner import execute

    if smoke:
        _smoke(load_recipe(recipe, overrides), output, workspace, quiet=quiet, log_json=log_json)
        return
    loaded = load_recipe(recipe, overrides)
    plan = make_plan(loaded, output=output, workspace=workspace, planning=False, allow_code=allow_code)
    with reporter(quiet=quiet, log_json=log_json) as progress:
        result = execute(plan, progress, fresh=fresh)
    print_report(result.report, report_console(sys.stdout))
    result.raise_if_failed()


def _smoke(
    loaded: LoadedRecipe, output: Path | None, workspace: Path | None, *, quiet: bool, log_json: bool
) -> None:
    from compressor.cli.progress import reporter
    from compressor.cli.smoke_view import print_smoke
    from compressor.planner.plan import make_plan
    from compressor.smoke.run import smoke

    plan = make_plan(loaded, output=output, workspace=workspace)
    with reporter(quiet=quiet, log_json=log_json) as progress:
        found = smoke(plan, progress)
    print_smoke(plan, found)
