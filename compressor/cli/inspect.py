"""``compress inspect``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click


@click.command(name="inspect")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
def command(checkpoint: Path, as_json: bool) -> None:
    """Show what the folder CHECKPOINT holds: tensors, dtypes, bytes, quantization, how its positions are
    scaled, and what is wrong with them. Reads headers only.
    """
    from compressor.checkpoint.inventory import read_config, take_inventory
    from compressor.rope.checked import check_positions

    found = take_inventory(checkpoint)
    config = read_config(checkpoint)
    findings, scaling = check_positions(config), _scaling(config)
    if as_json:
        positions = [dataclasses.asdict(finding) for finding in findings]
        told = dataclasses.asdict(found) | {"scaling": scaling, "positions": positions}
        click.echo(json.dumps(told, indent=2))
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
    if scaling is not None:
        console.print(_told(scaling), soft_wrap=True)
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


def _scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    """How a config's rotary positions are scaled, JSON-able; None where it has none that can be read."""
    from compressor.errors import CheckpointError
    from compressor.model.families import text_config
    from compressor.model.reach import reach
    from compressor.rope.positions import read_positions

    try:
        found = read_positions(config)
    except CheckpointError:
        return None
    return {
        "method": found.rope_type,
        "factor": found.parameters.get("factor"),
        "original_length": found.original_length,
        "length": reach(text_config(config)),
        "theta": found.theta,
    }


def _told(scaling: dict[str, Any]) -> str:
    """One line; values that are wrong may be of any type."""
    method = str(scaling["method"])[:40]
    parts = ["positions: not scaled" if method == "default" else f"positions: {method}"]
    for key, word, unit in (
        ("factor", "factor", ""),
        ("original_length", "from", " tokens"),
        ("length", "up to", " tokens"),
        ("theta", "theta", ""),
    ):
        value = scaling[key]
        if value is not None:
            parts.append(f"{word} {f'{value:,}' if isinstance(value, int) else str(value)[:40]}{unit}")
    return ", ".join(parts)
