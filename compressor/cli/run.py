"""``compress run``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from compressor.cli.options import (
    log_json_option,
    output_option,
    quiet_option,
    recipe_argument,
    set_option,
    workspace_option,
)


@click.command(name="run")
@recipe_argument
@set_option
@output_option
@workspace_option
@click.option("--fresh", is_flag=True, help="Do finished stages again.")
@quiet_option
@log_json_option
def command(
    recipe: str,
    overrides: tuple[str, ...],
    output: Path | None,
    workspace: Path | None,
    fresh: bool,
    quiet: bool,
    log_json: bool,
) -> None:
    """Run RECIPE and print what it gained and lost.

    RECIPE is a file, or the path of a shipped one (see `compress recipes`). A killed or interrupted run goes
    on where it was when the same command is given again. If a gate fails, the result is kept aside in the
    output folder's name with .gate-failed, and the exit status is 1.
    """
    from compressor.cli.progress import reporter
    from compressor.planner.plan import make_plan
    from compressor.recipe.load import load_recipe
    from compressor.report.terminal import print_report, report_console
    from compressor.runner import execute

    plan = make_plan(load_recipe(recipe, overrides), output=output, workspace=workspace, planning=False)
    with reporter(quiet=quiet, log_json=log_json) as progress:
        result = execute(plan, progress, fresh=fresh)
    print_report(result.report, report_console(sys.stdout))
    result.raise_if_failed()
