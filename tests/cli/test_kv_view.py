"""The table of the KV cache on terminals of several widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from compressor.cli.kv_view import point, print_kv
from compressor.planner.kv_choice import KvSize, kv_options

LLAMA = {"model_type": "llama", "max_position_embeddings": 131_072}


def shown(config, width: int, chosen: str | None = None) -> str:
    """What is printed."""
    stream = io.StringIO()
    print_kv(Console(file=stream, width=width, highlight=False), kv_options(config, chosen=chosen)[0])
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_number_is_cut(width):
    """Every row in one line, the chosen format marked."""
    text = shown(LLAMA, width, "fp8")
    lines = text.splitlines()
    assert all(len(line) <= width for line in lines)
    assert "…" not in text
    row = next(line for line in lines if line.startswith("> fp8 "))
    assert row.split()[-4:] == ["2.00", "8.00", "32.00", "256.00"]
    assert ("bytes a token" in text) == (width >= 80)


def test_what_does_not_help_or_go_is_said():
    """Scout's pages are padded; latent attention has few formats."""
    scout = {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}
    assert "no smaller in vLLM" in shown(scout, 120)
    assert "latent attention (MLA)" in shown({"model_type": "deepseek_v3"}, 120)
    assert "vLLM keeps layers 0, 1, 30, 31 in 16 bit for vLLM's turboquant formats" in shown(LLAMA, 120)


def test_formats_come_in_the_order_of_their_tiers():
    """vLLM's, ours, the fitted ones: each group once, under a heading of its own, in every process."""
    lines = [line.strip() for line in shown(LLAMA, 120).splitlines()]
    heads = [line for line in lines if line.endswith(":")]
    assert heads == ["own cache, not vLLM 0.32:", "the same, fitted to texts:"]
    places = [
        next(i for i, line in enumerate(lines) if line.startswith(one))
        for one in ("turboquant_3bit_nc", heads[0], "turboquant_mse_1bit", heads[1], "fitted_2.5bit")
    ]
    assert places == sorted(places)


def test_contexts_are_named_in_binary_thousands():
    """Where they are whole."""
    assert [point(KvSize(tokens, users, 0)) for tokens, users in ((131072, 1), (10**6, 4), (2**20, 1))] == [
        "128K",
        "1,000,000 x 4",
        "1M",
    ]
