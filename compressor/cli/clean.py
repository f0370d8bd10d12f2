"""``compress clean``."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import click

from compressor.cli.options import DEFAULT_WORKSPACE
from compressor.workspace import Entry, Workspace


@click.command(name="clean")
@click.option(
    "--workspace",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_WORKSPACE,
    show_default=True,
    help="The workspace folder.",
)
@click.option("--delete", is_flag=True, help="Delete instead of showing.")
@click.option("--partial", is_flag=True, help="Only stages that were interrupted.")
def command(workspace: Path, delete: bool, partial: bool) -> None:
    """Show what a workspace holds; with --delete, free it.

    Exported checkpoints are not touched: they keep their files.
    """
    space = Workspace(workspace.absolute())
    entries = [entry for entry in space.entries() if not (partial and entry.finished)]
    for entry in entries:
        click.echo(_line(entry, space.root))
    total = space.reclaimable_bytes(entries)
    if not entries:
        click.echo(f"nothing in {space.root}")
    elif not delete:
        click.echo(f"--delete frees {total / 1e6:.1f} MB (files shared with exports stay with them)")
    else:
        with space.locked():
            for entry in entries:
                shutil.rmtree(entry.path)
        click.echo(f"freed {total / 1e6:.1f} MB")


def _line(entry: Entry, root: Path) -> str:
    state = "finished" if entry.finished else "interrupted"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified))
    return f"{entry.nbytes / 1e6:10.1f} MB  {state:<11}  {when}  {entry.path.relative_to(root)}"
