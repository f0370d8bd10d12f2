"""``compress report``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from compressor.report.model import Report
    from compressor.report.side_by_side import Run


@click.command(name="report")
@click.argument("folders", metavar="DIR...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="The report file itself, or the comparison, on stdout.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the page into this HTML file as well.",
)
def command(folders: tuple[Path, ...], as_json: bool, output: Path | None) -> None:
    """Show the report of the checkpoint in DIR, or several runs of one source side by side."""
    reports = [_load(folder) for folder in folders]
    if len(reports) == 1:
        _show_one(reports[0], as_json, output)
    else:
        _compare(_runs(folders, reports), as_json, output)


def _load(folder: Path) -> Report:
    from compressor.errors import UserError
    from compressor.export import failed_folder
    from compressor.report.model import load_report

    aside = failed_folder(folder)
    if not folder.exists() and aside.exists():
        raise UserError("a gate failed: the result was kept aside", where=str(folder), fix=f"look at {aside}")
    return load_report(folder)


def _show_one(report: Report, as_json: bool, output: Path | None) -> None:
    from compressor.report.html import render_html
    from compressor.report.terminal import print_report, report_console

    if output is not None:
        _write(output, render_html(report))
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        print_report(report, report_console(sys.stdout))


def _runs(folders: tuple[Path, ...], reports: list[Report]) -> list[Run]:
    """Runs by the names of their reports, or of their folders where names are the same."""
    from compressor.errors import CheckpointError
    from compressor.report.manifest import read_manifest
    from compressor.report.side_by_side import Run

    count = Counter(report.name for report in reports)
    runs = []
    for folder, report in zip(folders, reports, strict=True):
        try:
            fingerprint: str | None = read_manifest(folder).source.fingerprint
        except CheckpointError:
            fingerprint = None
        runs.append(Run(report.name if count[report.name] == 1 else str(folder), fingerprint, report))
    return runs


def _compare(runs: list[Run], as_json: bool, output: Path | None) -> None:
    from compressor.errors import UserError
    from compressor.report.side_by_side import side_by_side, source_differences
    from compressor.report.side_by_side_html import render_side_by_side
    from compressor.report.terminal import print_side_by_side, report_console

    differences = source_differences(runs)
    if differences:
        raise UserError(
            f"these runs are not of one source: {'; '.join(differences)}",
            where="compress report",
            fix="name runs of one source",
        )
    compared = side_by_side(runs)
    if output is not None:
        _write(output, render_side_by_side(runs, compared))
    if as_json:
        click.echo(json.dumps(compared.to_json(), indent=2))
    else:
        print_side_by_side(compared, report_console(sys.stdout))


def _write(output: Path, page: str) -> None:
    from compressor.workspace import write_atomic

    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, page.encode())
    click.echo(f"wrote {output}", err=True)
