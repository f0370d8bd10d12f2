"""KV-cache formats on one model: bits, bytes, perplexity, KL, agreement, generation and needles."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.kv.formats import FORMATS
from compressor.report.kv_plot import quality_svg
from scripts.benchmarks.process import RESULTS, SOURCE, bf16_folder, compress

MODES = ("strict", "vllm")


def kv(options: argparse.Namespace) -> dict[str, Any]:
    """Every format in each mode by ``compress eval --kv``; writes a plot of each mode beside the result."""
    folder = bf16_folder(options.work, options.model)
    formats = options.formats or list(FORMATS)
    modes: dict[str, list[dict[str, Any]]] = {}
    for mode in options.modes:
        how = ["--source", folder, "--text", options.text, "--tokens", str(options.tokens), "--json"]
        how += ["--context", str(options.length), "--kv", ",".join(formats), "--kv-mode", mode]
        if options.needle:
            how += ["--kv-needle", ",".join(map(str, options.needle))]
        found = json.loads(compress("eval", folder, *how)["stdout"])
        modes[mode] = [record | {"tier": FORMATS[record["format"]].tier} for record in found["kv"]]
        print(f"\n{render_kv(modes[mode])}")
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"kv-{mode}.svg").write_text(quality_svg(modes[mode]) + "\n")
    how_measured = {"tokens": options.tokens, "context": options.length}
    return {"model": str(options.model or SOURCE), "text": options.text, **how_measured, "modes": modes}


def render_kv(records: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of one mode, widest formats first."""
    new_tokens = next((r["generation"]["new_tokens"] for r in records if r["generation"]), 0)
    lines = [
        f"| KV cache, {records[0]['mode']} | served by | bits | bytes a token | peak bytes | perplexity "
        f"| 95% | mean KL | KL 99.9% | top-1 | same of {new_tokens} | needles of 16 bit's | answer, nats |",
        "|---" * 13 + "|",
    ]
    for record in sorted(records, key=lambda record: -record["bits"]):
        perplexity, needle = record["perplexity"], record["needle"]
        interval = perplexity["increase_ci95"]
        cells = [
            record["format"],
            "vLLM 0.32" if record["tier"] == "vllm" else "own cache",
            f"{record['bits']:.2f}",
            f"{record['bytes_per_token']:,.0f}",
            f"{record['peak_bytes']:,}",
            f"{perplexity['increase']:+.2%}",
            f"{interval[0]:+.2%} to {interval[1]:+.2%}" if interval else "",
            f"{record['kl']['mean']:.5f}",
            f"{record['kl']['p999']:.3f}",
            f"{record['top1_agreement']:.2%}",
            f"{record['generation']['until_divergence']:.1f}" if record["generation"] else "",
            f"{needle['relative_score']:.3f}" if needle and needle["relative_score"] is not None else "",
            f"{needle['logprob_change']:+.3f}" if needle else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
