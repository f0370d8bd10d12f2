"""``compress eval``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from compressor.budget.gates import check_gate_metric, check_gates, gate_samples
from compressor.cli.draft_options import draft_options
from compressor.cli.long_options import long_options
from compressor.cli.measure_options import Measures, measure_options
from compressor.cli.options import DEFAULT_WORKSPACE, from_option, log_json_option, quiet_option
from compressor.errors import GateError, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from compressor.budget.gates import GateVerdict
    from compressor.evals.base import EvalResult, TextResult
    from compressor.evals.decode_record import DecodingResult
    from compressor.evals.decode_spec import DecodeSpec
    from compressor.recipe.evaluate_long import LongSection


# With --long and no text: of a shipped text, as many tokens as a recipe reads by default.
_TEXT, _TOKENS = "calibration/heldout.jsonl", 16384


@click.command(name="eval")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--source", required=True, help="What it was made from: folder, Hub id, .gguf or pkg:NAME/FILE."
)
@click.option("--revision", help="Commit, tag or branch of a Hub source.")
@from_option
@click.option("--text", help=f"A UTF-8 text, or .jsonl with a text field.  [with --long or --task: {_TEXT}]")
@click.option("--tokens", type=click.IntRange(min=2), help="Tokens of the text to read.  [default: all]")
@click.option("--context", type=click.IntRange(min=2), default=1024, show_default=True, help="Window tokens.")
@click.option(
    "--kv",
    "kv_formats",
    metavar="FORMAT[,FORMAT...]",
    help="Measure CHECKPOINT with these KV-cache formats too; `plan` is its own kv_plan.json.",
)
@click.option(
    "--kv-mode",
    type=click.Choice(["strict", "vllm"]),
    help="strict: every key and value as stored; vllm: as vLLM 0.32 reads them.  [default: strict]",
)
@click.option(
    "--kv-needle", metavar="TOKENS[,TOKENS...]", help="Hide needles in texts of these lengths for --kv."
)
@long_options
@draft_options
@measure_options
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")
@quiet_option
@log_json_option
def command(
    checkpoint: Path,
    source: str,
    revision: str | None,
    from_: Literal["dequantize"] | None,
    text: str | None,
    tokens: int | None,
    context: int,
    kv_formats: str | None,
    kv_mode: Literal["strict", "vllm"] | None,
    kv_needle: str | None,
    long: LongSection | None,
    long_window: int | None,
    long_seed: int,
    draft: str | None,
    draft_dtype: str | None,
    decoding: DecodeSpec | None,
    measures: Measures,
    as_json: bool,
    quiet: bool,
    log_json: bool,
) -> None:
    """Measure the folder CHECKPOINT against its source on any text.

    Perplexity of both, KL divergence and top-1 agreement, on the same tokens. With --kv also CHECKPOINT with
    its KV cache in each format against itself with a 16-bit cache. With --long also both on long documents,
    by position, and the source through a window of the length that it was trained at. With --draft also
    CHECKPOINT decoding with proposed tokens against itself without; alone where no text is named. With
    --task, --continuations and --speed also both on lm-eval's tasks, continuing the text, and against the
    clock; with --gate the exit code is 1 where a bound does not hold.
    """
    from compressor.cli.progress import reporter
    from compressor.compare import More, compare, compare_drafts
    from compressor.workspace import Workspace

    if text is None and (long is not None or measures):
        text, tokens = _TEXT, tokens or _TOKENS
    _check(text, tokens, draft, kv_formats, kv_mode or kv_needle)
    space = Workspace(DEFAULT_WORKSPACE.absolute())
    for gate in measures.gates:
        check_gate_metric(gate.metric, measures.tasks, ["needle"] if long and long.needles else [])
    result = decoded = None
    with reporter(quiet=quiet, log_json=log_json) as progress:
        if text is not None:
            result = compare(
                checkpoint,
                source,
                text,
                revision=revision,
                from_=from_,
                tokens=tokens,
                context=context,
                space=space,
                progress=progress,
                kv=_names(kv_formats),
                kv_mode=kv_mode or "strict",
                kv_needle=_lengths(kv_needle),
                long=long,
                long_window=long_window,
                long_seed=long_seed,
                more=More(**measures.more),
            )
        if draft is not None and decoding is not None:
            decoded = compare_drafts(
                checkpoint,
                source,
                draft,
                decoding,
                revision=revision,
                from_=from_,
                dtype=draft_dtype,
                cache=space.hub,
                progress=progress,
            )
    gates = check_gates(measures.gates, gate_samples(result)) if result else []
    _show(result, decoded, gates, as_json=as_json)


def _check(
    text: str | None, tokens: int | None, draft: str | None, kv_formats: str | None, kv_more: str | None
) -> None:
    """Refuses options that measure nothing, or say how something is measured that is not.

    Raises:
        UserError: naming them.
    """
    if kv_more and not kv_formats:
        raise UserError(
            "--kv-mode and --kv-needle say how --kv measures", fix="name formats: --kv FORMAT,FORMAT"
        )
    if text is None and draft is None:
        raise UserError("nothing to measure on", fix="name a text: --text FILE")
    if text is None and tokens is not None:
        raise UserError("--tokens has no text to read", fix="name one: --text FILE")
    if text is None and kv_formats:
        raise UserError("--kv has no text to measure on", fix="name one: --text FILE")


def _show(
    result: EvalResult | None,
    decoded: DecodingResult | None,
    gates: Sequence[GateVerdict],
    *,
    as_json: bool,
) -> None:
    """What was measured, on stdout; then an error where decoding loses something, or a gate fails."""
    if as_json:
        measured = result.to_json() if result else {}
        more = {"decoding": decoded.to_json()} if decoded else {}
        judged = {"gates": [vars(gate) for gate in gates]} if gates else {}
        click.echo(json.dumps(_worded(measured | more | judged), indent=2))
    else:
        if result is not None:
            _print(result, gates)
        if decoded is not None:
            _print_decoding(decoded)
    if decoded is not None:
        from compressor.evals.decode_compare import check_lossless

        check_lossless(decoded)
    failed = [gate.sentence() for gate in gates if not gate.passed]
    if failed:
        raise GateError("; ".join(failed))


def _worded(value: Any) -> Any:
    """JSON has neither infinities nor NaN: they are the words that ``report.json`` has for them."""
    if isinstance(value, dict):
        return {key: _worded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_worded(inner) for inner in value]
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _print_decoding(decoded: DecodingResult) -> None:
    from rich.console import Console

    from compressor.report.terminal import print_decoding

    print_decoding(decoded.to_json(), Console(file=sys.stdout, highlight=False, markup=False))


def _print(result: EvalResult, gates: Sequence[GateVerdict]) -> None:
    """Tables on stdout."""
    from rich.console import Console

    from compressor.cli.kv_results import kv_tables
    from compressor.report.measured import Gate
    from compressor.report.terminal import print_evaluated, print_long

    console = Console(file=sys.stdout, highlight=False, markup=False)
    console.print(_text_table(result.text))
    found = result.text
    console.print(
        f"{found.tokens:,} tokens of {result.text_label}, windows of {found.context}, {result.text_dtype}",
        soft_wrap=True,
    )
    print_evaluated(result.to_json(), [Gate(**vars(gate)) for gate in gates], console)
    if result.long is not None:
        print_long(result.long.to_json(), console)
    if result.kv:
        for measured in kv_tables(result.kv):
            console.print(measured)


def _text_table(found: TextResult) -> Table:
    """Perplexity, KL and agreement."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "source", "result", "change"):
        table.add_column(name, justify="right" if name else "left")
    interval = ""
    if found.increase_ci95:
        low, high = found.increase_ci95
        interval = f" (95%: {low:+.2%} to {high:+.2%})"
    table.add_row(
        "perplexity",
        f"{found.perplexity_source:.4f}",
        f"{found.perplexity_result:.4f}",
        f"{found.increase:+.2%}{interval}",
    )
    table.add_row("KL mean, nats", "", f"{found.kl_mean:.5f}", "")
    table.add_row("KL 99.9%", "", f"{found.kl_p999:.4f}", "")
    table.add_row("top-1 agreement", "", f"{found.top1_agreement:.2%}", "")
    return table


def _names(words: str | None) -> list[str]:
    """The formats of --kv.

    Raises:
        UserError: one has no name.
    """
    if words is None:
        return []
    names = [name.strip() for name in words.split(",")]
    if not all(names):
        raise UserError(
            f"--kv {words!r} has a format without a name", fix="for example fp8,turboquant_4bit_nc"
        )
    return names


def _lengths(words: str | None) -> list[int]:
    """``512,1024`` as numbers."""
    try:
        return [int(word) for word in words.split(",")] if words else []
    except ValueError as error:
        raise UserError(f"--kv-needle {words!r} is no list of lengths", fix="for example 512,1024") from error
