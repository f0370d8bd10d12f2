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
    """Show what the folder CHECKPOINT holds: tensors, dtypes, bytes, quantization, and what is wrong with its
    positions. Reads headers only.
    """
    from compressor.checkpoint.inventory import read_config, take_inventory
    from compressor.rope.checked import check_positions

    found = take_inventory(checkpoint)
    findings = check_positions(read_config(checkpoint))
    if as_json:
        positions = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps(dataclasses.asdict(found) | {"positions": positions}, indent=2))
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
    for finding in findings:
        console.print(f"{finding.severity}: positions: {finding.what}", soft_wrap=True)
