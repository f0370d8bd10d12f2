"""How measured KV-cache formats are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from compressor.evals.kv_record import KvResult

_READ = {
    "strict": "read as stored",
    "vllm": "read as by vLLM 0.32 after a raw prompt",
}


def kv_tables(results: Sequence[KvResult]) -> Iterator[str | Table]:
    """What each format takes and does to the model; then needles by length, where they were hidden."""
    yield f"\nKV cache against 16 bit, {_READ[results[0].mode]} (ppl: perplexity)"
    yield _quality(results)
    if any(result.needle for result in results):
        yield "\nNeedles found of those in 16 bit (change of the answer's log-probability, nats)"
        yield _needles(results)


def _quality(results: Sequence[KvResult]) -> Table:
    table = _table()
    table.add_column("format", no_wrap=True)
    made = results[0].generation
    same = [f"same of {made.new_tokens}"] if made else []
    for name in ("bits", "B/token", "ppl", "95%", "KL", "top-1", *same):
        table.add_column(name, justify="right")
    for result in results:
        text = result.text
        low_high = text.increase_ci95
        cells = [
            result.format,
            f"{result.bits:.2f}",
            f"{result.bytes_per_token:.0f}",
            f"{text.increase:+.2%}",
            f"{100 * low_high[0]:+.2f}, {100 * low_high[1]:+.2f}" if low_high else "",
            f"{text.kl_mean:.4f}",
            f"{text.top1_agreement:.1%}",
            *([f"{result.generation.until_divergence:.0f}"] if result.generation else []),
        ]
        table.add_row(*cells)
    return table


def _needles(results: Sequence[KvResult]) -> Table:
    """Found by each format and by 16 bit, and the mean change of an answer's log-probability, by length."""
    table = _table()
    table.add_column("format", no_wrap=True)
    lengths = sorted({cell.tokens for result in results if result.needle for cell in result.needle.cells})
    for tokens in lengths:
        table.add_column(f"{tokens:,} tokens", justify="right")
    for result in results:
        cells = [result.needle.at(tokens) for tokens in lengths] if result.needle else []
        table.add_row(
            result.format,
            *(
                f"{sum(cell.found for cell in part.cells)} of {sum(cell.found_16bit for cell in part.cells)}"
                f" ({part.logprob_change:+.2f})"
                for part in cells
            ),
        )
    return table


def _table() -> Table:
    return Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
