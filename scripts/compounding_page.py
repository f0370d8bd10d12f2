"""Prints the tables of docs/compounding.md from the plans of shipped recipes.

python scripts/compounding_page.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from compressor.planner.compounding import compounding_facts  # noqa: E402
from compressor.planner.plan import make_plan  # noqa: E402
from compressor.recipe.gpus import GPUS  # noqa: E402
from compressor.recipe.load import load_recipe  # noqa: E402
from compressor.report.compounding import (  # noqa: E402
    CompoundingFacts,
    RowKey,
    amount,
    claim_rows,
)

PLANNED = ["qwen3-32b-nvfp4", "llama-70b-nvfp4", "llama3-70b-128k", "scout-nvfp4", "maverick-nvfp4"]
PLANNED += ["deepseek-v3-nvfp4", "llama3-70b-compounded"]
CLAIMED = ["qwen3-32b-nvfp4", "llama3-70b-compounded"]
_KEYS: list[tuple[RowKey, str]] = [
    ("weights", "weights"),
    ("cache", "cache of one user"),
    ("gpus", "GPUs"),
    ("users", "users on as many GPUs as before"),
    ("gpu_speed", "tokens/s of a user, for each GPU"),
]


@cache
def facts_of(name: str) -> CompoundingFacts:
    """Of a shipped recipe."""
    found, reason = compounding_facts(make_plan(load_recipe(f"recipes/{name}.yaml"), planning=True))
    assert found is not None, reason
    return found


def planned_table(names: Sequence[str] = PLANNED) -> Iterator[str]:
    """A row for each recipe: before -> after."""
    yield f"| recipe | served to | on | {' | '.join(title for _, title in _KEYS)} |"
    yield "|---|---|---|" + "---:|" * len(_KEYS)
    for name in names:
        facts = facts_of(name)
        point, rows = facts.point, {row.key: row for row in facts.rows}
        cells = [
            " -> ".join(
                "-" if cell.value is None else amount(rows[key].unit, cell.value)
                for cell in (rows[key].baseline, rows[key].optimized)
            )
            for key, _ in _KEYS
        ]
        yield f"| `{name}` | {point.concurrency} x {point.context:,} | {point.gpu} | {' | '.join(cells)} |"


def ledger_table(names: Sequence[str] = PLANNED) -> Iterator[str]:
    """A row for each recipe: its factors, and the product of each ledger."""
    yield "| recipe | memory held | bytes moved for a token | operations for a token |"
    yield "|---|---|---|---|"
    for name in names:
        cells = []
        for ledger in facts_of(name).ledgers:
            factors = [f"{step.factor:,.2f} ({_word(step.what)})" for step in ledger.steps]
            cells.append(f"{' x '.join(factors)} = {ledger.product:,.2f}" if factors else "-")
        yield f"| `{name}` | {' | '.join(cells)} |"


def claim_table(names: Sequence[str] = CLAIMED) -> Iterator[str]:
    """A row for each claim of the recipes."""
    yield "| recipe | what | claimed | computed | measured |"
    yield "|---|---|---|---|---|"
    for name in names:
        for cells in claim_rows(facts_of(name)):
            yield f"| `{name}` | {' | '.join(cells)} |"


def gpu_table() -> Iterator[str]:
    """The GPUs that recipes name."""
    yield "| `gpu` | memory, GB | GB/s | 1e12 dense operations/s | source |"
    yield "|---|---:|---:|---|---|"
    for gpu in GPUS.values():
        rates = ", ".join(f"{name} {rate / 1e12:g}" for name, rate in gpu.flops.items())
        memory, bandwidth = f"{gpu.memory_bytes / 1e9:g}", f"{gpu.bandwidth / 1e9:,g}"
        yield f"| `{gpu.name}` | {memory} | {bandwidth} | {rates} | {gpu.source} |"


def _word(what: str) -> str:
    """The step in a word."""
    words = {"experts": "experts", "attention": "attention", "weights": "weights", "cache": "cache"}
    return next((word for start, word in words.items() if what.startswith(start)), "draft")


def main() -> None:
    """Prints all of them."""
    for table in (gpu_table(), planned_table(), ledger_table(), claim_table()):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
