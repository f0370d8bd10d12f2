"""What a checkpoint holds, as tables on a terminal. Strangers' names in it are made safe to show."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor.report.contents import Contents, Row
from compressor.report.words import counted, number, short_name, size, visible

_TITLE_WIDTH = 9
# Narrower, the column of tensors is left out.
_NARROW = 76


def print_contents(contents: Contents, facts: Mapping[str, str]) -> None:
    """Prints it on stdout; no colour without a terminal."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    inventory = contents.inventory
    named = ", ".join(map(short_name, inventory.architectures)) or contents.form
    # A path must survive copying.
    console.print(Text(f"{short_name(inventory.folder)}: {named}"), soft_wrap=True)
    console.print(_titles(contents, facts))
    console.print()
    console.print(_weights(contents.rows, wide=console.width >= _NARROW))
    console.print()
    console.print(_uses(contents))
    for finding in contents.positions:
        style = "red" if finding.severity == "error" else "yellow"
        console.print(Text(f"{finding.severity}: positions: {short_name(finding.what)}", style=style))
    for note in contents.notes:
        console.print(Text(f"note: {visible(note)}"))


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=_TITLE_WIDTH, no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _titles(contents: Contents, facts: Mapping[str, str]) -> Table:
    """The model as a whole."""
    grid, inventory, parameters = _grid(), contents.inventory, contents.parameters
    for key, value in facts.items():
        grid.add_row(key, Text(short_name(value)))
    if contents.model_type:
        grid.add_row("family", Text(f"{contents.family} (model_type {short_name(contents.model_type)})"))
    if contents.made_by:
        grid.add_row("made by", Text(short_name(contents.made_by)))
    files = f" in {counted(len(inventory.files), 'file')}" if inventory.files else ""
    dtypes = ", ".join(f"{dtype} {size(found['bytes'])}" for dtype, found in contents.dtypes.items())
    tensors = f"{counted(inventory.tensors, 'tensor')}, {size(inventory.bytes)}{files}"
    grid.add_row("tensors", Text(tensors))
    grid.add_row("dtypes", Text(dtypes))
    active = f", {_count(parameters.active)} active" if parameters.active is not None else ""
    tied = "; the output head is the embedding" if contents.tied else ""
    grid.add_row("weights", Text(f"{_count(parameters.total)}{active}{tied}"))
    if contents.bits_per_weight is not None and contents.bits_per_target_weight is not None:
        told = f"{number(contents.bits_per_weight, 3)} per weight over all of them"
        whose = "quantized" if contents.method or contents.form == "gguf" else "linear"
        grid.add_row("bits", Text(told))
        of_targets = (
            f"{number(contents.bits_per_target_weight, 3)} over the {_count(parameters.target)} {whose} ones"
        )
        grid.add_row("", Text(of_targets))
    grid.add_row("method", Text(_method(contents)))
    return grid


def _method(contents: Contents) -> str:
    if not contents.method:
        return "GGUF" if contents.form == "gguf" else "not quantized"
    quantization = contents.inventory.quantization or {}
    algorithm = quantization.get("quant_algo") or quantization.get("format")
    return short_name(f"{contents.method}: {algorithm}" if algorithm else contents.method)


def _weights(rows: tuple[Row, ...], *, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", overflow="fold")
    table.add_column("stored as", overflow="fold")
    for name in ("tensors", "weights", "size", "bits") if wide else ("weights", "size", "bits"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [_count(row.parameters), size(row.bytes), "" if row.bits is None else number(row.bits, 2)]
        table.add_row(row.role, Text(short_name(row.scheme)), *([f"{row.tensors:,}"] if wide else []), *cells)
    return table


def _uses(contents: Contents) -> Table:
    """What it does, and who reads it."""
    grid = _grid()
    for title, line in _beside(contents):
        grid.add_row(title, Text(line))
    for index, loader in enumerate(contents.engines):
        grid.add_row(
            "" if index else "loads in", Text(visible(f"{loader.engine}: {loader.loads}; {loader.why}"))
        )
    return grid


def _beside(contents: Contents) -> Iterator[tuple[str, str]]:
    if contents.experts["count"]:
        yield (
            "experts",
            f"{contents.experts['count']:,} in a layer, {contents.experts['per_token']} for a token",
        )
    yield "kv cache", _kv(contents)
    if contents.scaling is not None:
        yield "positions", _scaled(contents.scaling)
    layers, tensors = contents.predictions["layers"], contents.predictions["tensors"]
    if tensors:
        told = f"{counted(layers, 'prediction layer')}, " if layers else "prediction layers, "
        yield "mtp", f"{told}{counted(tensors, 'tensor')}"
    if (draft := contents.draft) is not None:
        layers_told = f", {counted(draft.layers, 'layer')}" if draft.layers else ""
        tokens = f", {draft.vocabulary:,} tokens" if draft.vocabulary else ""
        yield "draft", short_name(f"{draft.architecture}{layers_told}{tokens} (folder draft)")
    if (adapter := contents.adapter) is not None:
        base = f", on {adapter.base}" if adapter.base else ""
        yield "adapter", short_name(f"rank {adapter.rank}, alpha {adapter.alpha}{base} ({adapter.place})")
        yield "", short_name(", ".join(adapter.targets))


def _kv(contents: Contents) -> str:
    cache = contents.kv_cache
    told = short_name(cache.format) + (f" ({cache.stated_in})" if cache.stated_in else "")
    if cache.scales:
        told += f", {counted(cache.scales, 'tensor')} of scales"
    if cache.bytes_per_token_16bit is None:
        return told
    told += (
        f"{', ' if cache.format == '16 bit' else '; in 16 bit '}{size(cache.bytes_per_token_16bit)} a token"
    )
    return told + (f" and {size(cache.state_bytes)} of states" if cache.state_bytes else "")


def _scaled(scaling: Mapping[str, object]) -> str:
    """One line; values that are wrong may be of any type."""
    method = short_name(str(scaling["method"])[:40])
    parts = ["not scaled" if method == "default" else method]
    for key, word, unit in (
        ("factor", "factor", ""),
        ("original_length", "from", " tokens"),
        ("length", "up to", " tokens"),
        ("theta", "theta", ""),
    ):
        value = scaling[key]
        if value is not None:
            told = f"{value:,}" if isinstance(value, int) else short_name(str(value)[:40])
            parts.append(f"{word} {told}{unit}")
    return ", ".join(parts)


def _count(parameters: int) -> str:
    """``134.5M``, ``68.4B``."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:,.1f}{letter}"
    return str(parameters)
