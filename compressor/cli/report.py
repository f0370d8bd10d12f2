"""``compress report``."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command(name="report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The report file itself, on stdout.")
def command(folder: Path, as_json: bool) -> None:
    """Show the report of the checkpoint in FOLDER."""
    from compressor.errors import UserError
    from compressor.export import failed_folder
    from compressor.report.model import load_report
    from compressor.report.terminal import print_report, report_console

    aside = failed_folder(folder)
    if not folder.exists() and aside.exists():
        raise UserError("a gate failed: the result was kept aside", where=str(folder), fix=f"look at {aside}")
    report = load_report(folder)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        print_report(report, report_console(sys.stdout))
