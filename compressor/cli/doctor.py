"""``compress doctor``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from compressor.cli.options import DEFAULT_WORKSPACE
from compressor.errors import EXIT_GATE


@click.command(name="doctor")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out"),
    show_default=True,
    help="The folder that outputs go to.",
)
@click.option(
    "--workspace",
    type=click.Path(path_type=Path),
    default=DEFAULT_WORKSPACE,
    show_default=True,
    help="The workspace folder.",
)
@click.option(
    "--engine-python",
    type=click.Path(path_type=Path),
    help="The interpreter of an environment with vLLM, as of `compress verify`.",
)
@click.option("--offline", is_flag=True, help="Do not ask whether the Hub answers.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
@click.pass_context
def command(
    ctx: click.Context,
    output: Path,
    workspace: Path,
    engine_python: Path | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Look at this machine: packages, devices, disks, the Hub, the engine and the formats that it serves.

    Each thing that is wrong is told with its mend. Exit status 1 if something is broken that no run can do
    without; warnings are what some commands miss, and leave it 0. Of a Hub token only whether there is one
    is told.
    """
    from compressor.verify.doctor import examine

    places = {"output": output, "workspace": workspace}
    health = examine(places, engine_python, offline=offline)
    if as_json:
        click.echo(json.dumps(health.to_json(), indent=2))
    else:
        from compressor.cli.doctor_view import print_health

        print_health(health)
    if health.broken:
        ctx.exit(EXIT_GATE)
