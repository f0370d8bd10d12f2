"""The KV cache in report, card, terminal, page and launch line."""

from __future__ import annotations

import io

import pytest

from compressor.report.card import render_card
from compressor.report.html import render_html
from compressor.report.kv import KvFacts, KvQuality, KvSizes, kv_caption, kv_quality_rows, kv_rows
from compressor.report.model import Report
from compressor.report.serve import serve_facts
from compressor.report.terminal import print_report, report_console

from .sample import RECIPE, sample_report

GIB = 2**30
QUALITY = KvQuality(
    mode="strict",
    perplexity_16bit=10.0,
    perplexity=10.1,
    increase=0.01,
    increase_ci95=(0.005, 0.015),
    kl_mean=0.01,
    kl_p999=0.2,
    top1_agreement=0.97,
    tokens=1000,
)
FACTS = KvFacts(
    format="turboquant_4bit_nc",
    formats={"bf16": 4, "turboquant_4bit_nc": 26},
    tier="vllm",
    servable=True,
    flags="--kv-cache-dtype turboquant_4bit_nc --kv-cache-dtype-skip-layers 3 17",
    bytes_per_token_before=23_040,
    bytes_per_token=8_532,
    bits=5.93,
    sizes=(KvSizes(context=8192, users=8, before=4 * GIB, after=GIB),),
    notes=("values of 26 of 26 layers are rotated inside the weights",),
    changed_16bit=("model.layers.0.self_attn.k_norm.weight",),
    quality=(QUALITY,),
)


def with_kv(facts: KvFacts) -> Report:
    """The sample with a KV cache."""
    report = sample_report()
    return report.model_copy(update={"kv": facts, "serve": serve_facts("out", ["NVFP4A16"], kv=facts)})


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_view_says_it(width: int) -> None:
    """Bytes, quality, folds, the launch line in one piece."""
    report = with_kv(FACTS)
    stream = io.StringIO()
    print_report(report, report_console(stream, width))
    for text in (stream.getvalue(), render_card(report, RECIPE), render_html(report)):
        assert "KV cache" in text
        assert "4.00x" in text
        assert "+1.00%" in text
    assert "vllm serve out --kv-cache-dtype turboquant_4bit_nc --kv-cache-dtype-skip-layers 3 17\n" in (
        stream.getvalue()
    )
    assert Report.from_json(report.to_json()) == report


def test_what_vllm_cannot_serve_is_labelled() -> None:
    """In the caption and beside the launch line, which has no flags then."""
    facts = FACTS.model_copy(update={"servable": False, "flags": "", "tier": "own"})
    assert "not servable by vLLM 0.32" in kv_caption(facts)
    serve = serve_facts("out", ["NVFP4A16"], kv=facts)
    assert serve.command == "vllm serve out"
    assert any("not servable by vLLM 0.32" in note for note in serve.notes)


def test_rows() -> None:
    """Numbers as people read them."""
    assert kv_rows(FACTS) == [("8,192 x 8", "4.000 GiB", "1.000 GiB", "4.00x")]
    assert kv_quality_rows(FACTS)[0][:4] == ("as stored", "10.1000", "10.0000", "+1.00%")
