"""The KV cache in the plan: formats against contexts and users."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compressor.planner.kv_choice import KvOption, KvSize, no_smaller
from compressor.planner.kv_planned import KvPlanned

# Below this many columns the bytes of a token are left out.
_NARROW = 80
_GIB = 2**30
_PRESETS = "turboquant_"
_HEADINGS = {
    "vllm": "",
    "own": "own cache, not vLLM 0.32:",
    "research": "the same, fitted to texts:",
}


def print_kv(console: Console, options: Sequence[KvOption]) -> None:
    """Prints the table on the console; nothing where the cache is not known."""
    possible = [option for option in options if not option.problem]
    if not possible:
        return
    narrow = console.width < _NARROW
    title = "\nKV cache in GiB, by tokens of a sequence and sequences at once (vLLM: with its pages)"
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("format", no_wrap=True)
    if not narrow:
        table.add_column("bytes a token", justify="right")
    for size in possible[0].sizes:
        table.add_column(point(size), justify="right", no_wrap=True)
    for tier, heading in _HEADINGS.items():
        found = [option for option in possible if option.tier == tier]
        if found and heading:
            table.add_row(Text(heading, style="dim"))
        for option in found:
            table.add_row(*_row(option, narrow=narrow), style="bold" if option.chosen else "")
    console.print(Text(title))
    console.print(table)
    for line in _notes(options):
        console.print(Text(line))


def kv_lines(planned: KvPlanned, notes: Sequence[str]) -> tuple[str, ...]:
    """What the recipe asks of the cache, what is folded for it, and how it will be served."""
    lines = [planned.described(), *notes]
    if planned.needs_data:
        lines.append("fitted to the calibration texts before the weights are touched")
    if planned.flags:
        lines.append(f"served with: vllm serve DIR {planned.flags}")
    return tuple(lines)


def _row(option: KvOption, *, narrow: bool) -> list[str]:
    cells = [f"{'>' if option.chosen else ' '} {option.format}"]
    if not narrow:
        cells.append(f"{option.bytes_per_token:,}")
    return cells + [f"{size.bytes / _GIB:,.2f}" for size in option.sizes]


def point(size: KvSize) -> str:
    """How a table names a context and a number of users: ``128K``, ``128K x 8``."""
    tokens = f"{size.context:,}"
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if size.context % unit == 0:
            tokens = f"{size.context // unit}{name}"
            break
    return tokens if size.users == 1 else f"{tokens} x {size.users}"


def _notes(options: Sequence[KvOption]) -> list[str]:
    """What the table does not say: layers that stay in 16 bit, formats that do not go or do not help."""
    kept: dict[tuple[int, ...], list[str]] = defaultdict(list)
    problems: dict[str, list[str]] = defaultdict(list)
    for option in options:
        if option.problem:
            problems[option.problem.replace(option.format, "the format")].append(option.format)
        elif option.kept:
            kept[option.kept].append(option.format)
    lines = [
        f"vLLM keeps layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} in 16 bit for "
        f"{_names(formats)}"
        for layers, formats in kept.items()
    ]
    if useless := no_smaller(options):
        lines.append(f"no smaller in vLLM, which pads the pages of all layers to one size: {_names(useless)}")
    return lines + [f"not for this model: {_names(formats)}: {why}" for why, formats in problems.items()]


def _names(formats: Sequence[str]) -> str:
    """The names; those of a family in one word."""
    presets = [name for name in formats if name.startswith(_PRESETS) and name.endswith(("_nc", "k8v4"))]
    others = [name for name in formats if name not in presets]
    paper = [name for name in others if name.startswith(_PRESETS)]
    others = [name for name in others if name not in paper]
    for found, word in ((presets, "vLLM's turboquant formats"), (paper, "the paper's turboquant formats")):
        others += [word] if len(found) > 2 else found
    return ", ".join(others)
