"""``compress inspect``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click


@click.command(name="inspect")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
def command(checkpoint: Path, as_json: bool) -> None:
    """Show what the folder CHECKPOINT holds: tensors, dtypes, bytes, quantization. Reads headers only."""
    from compressor.checkpoint.inventory import take_inventory

    found = take_inventory(checkpoint)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, markup=False)
    console.print(
        f"{found.folder}: {', '.join(found.architectures) or 'no architecture named'}", soft_wrap=True
    )
    console.print(f"{found.tensors:,} tensors, {found.bytes / 1e6:,.1f} MB in {len(found.files)} file(s)")
    quantization = found.quantization or {}
    groups = quantization.get("config_groups") or {}
    if "quant_algo" in quantization:  # ModelOpt's groups say less than this name
        console.print(f"{quantization.get('quant_method')}: {quantization['quant_algo']}", soft_wrap=True)
        groups = {}
    for name, group in groups.items():
        weights = group.get("weights") or {}
        console.print(
            f"{name}: {group.get('format')}, {weights.get('num_bits')}-bit {weights.get('type')}, "
            f"{weights.get('strategy')} {weights.get('group_size') or ''}, targets {group.get('targets')}",
            soft_wrap=True,
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("dtype")
    for name in ("tensors", "MB"):
        table.add_column(name, justify="right")
    for kind in found.kinds:
        table.add_row(kind.leaf, kind.dtype, f"{kind.tensors:,}", f"{kind.bytes / 1e6:,.2f}")
    console.print(table)
