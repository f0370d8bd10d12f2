"""The state of the machine on a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor.report.words import size, visible
from compressor.verify.doctor import Health

_STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}
_TOLD = ("python", "compressor", "torch", "transformers", "compressed-tensors")


def print_health(health: Health) -> None:
    """Prints it on stdout; no colour without a terminal."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    console.print(_facts(health))
    console.print()
    console.print(_formats(health))
    console.print()
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in health.checks:
        grid.add_row(Text(check.state, style=_STYLES[check.state]), check.name, Text(visible(check.what)))
        if check.fix:
            grid.add_row("", "", Text(f"-> {visible(check.fix)}"))
    console.print(grid)


def _facts(health: Health) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    told = ", ".join(f"{name} {health.versions.get(name) or 'missing'}" for name in _TOLD)
    grid.add_row("versions", Text(told))
    for device in health.devices:
        native = ", ".join(device["native"]) or "nothing below 32 bit"
        grid.add_row(
            "device", Text(f"{visible(device['name'])}: {_memory(device)}; multiplies {native} natively")
        )
    if versions := health.engine.get("versions"):
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        grid.add_row("engine", Text(visible(named)))
    return grid


def _memory(device: dict[str, object]) -> str:
    free, capability = device["free_bytes"], device.get("capability")
    assert isinstance(free, int)
    if not isinstance(capability, tuple):
        return f"{device['cores']} cores, {size(free)} free"
    total = device["memory_bytes"]
    assert isinstance(total, int)
    return f"compute capability {capability[0]}.{capability[1]}, {size(total)}, {size(free)} free"


def _formats(health: Health) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("scheme", no_wrap=True)
    table.add_column("computed in", no_wrap=True)
    table.add_column("tried in vLLM (docs/serving.md)", overflow="fold")
    for row in health.formats:
        tried = row["tried"]
        told = "not tried on such a device"
        if tried is not None:
            told = f"{tried['version']} on {tried['device']}: {tried['told']}"
        # Engines decode to 16 bit what the device does not multiply.
        arithmetic = row["arithmetic"] if row["native"] else f"16 bit, no {row['arithmetic']}"
        table.add_row(row["scheme"], arithmetic, Text(told))
    return table
