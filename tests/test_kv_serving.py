"""What the plan says of a cache's size, against the log of vLLM on a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.kv_serving import planned_tokens, render

SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("auto", 46_592),
        ("fp8", 93_200),
        ("turboquant_k8v4", 98_752),
        ("turboquant_4bit_nc", 125_824),
        ("turboquant_k3v4_nc", 135_776),
        ("turboquant_3bit_nc", 147_392),
    ],
)
def test_capacity_is_that_of_the_engine(name: str, tokens: int) -> None:
    """'GPU KV cache size' of vLLM 0.26 on an H100, SmolLM2-135M, 1 GiB (scripts/kv_serving.py)."""
    assert planned_tokens(SMOLLM2, name, 2**30) == tokens


def test_rows_and_errors() -> None:
    """A format that vLLM refuses has its words in the table; increases are over 16 bit."""
    rows: dict[str, dict[str, Any]] = {
        "auto": {"nll": 1.0, "tokens_logged": 10, "tokens_planned": 10},
        "fp8": {"nll": 1.1, "tokens_logged": None, "tokens_planned": 20},
        "nvfp4": {"error": "ValueError: no", "tokens_planned": 30},
    }
    lines = render(rows).splitlines()[2:]
    assert lines[1] == "| fp8 |  | 20 | 3.004 | +10.52% |"
    assert lines[2] == "| nvfp4 | ValueError: no | | | |"
