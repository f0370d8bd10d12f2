"""Tokens that a model reads, by its config."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.model.reach import reach

LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ({}, None),
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": "512"}, None),
        ({"max_position_embeddings": 512, "rope_parameters": LINEAR}, 2048),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 2}}, 1024),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 512, "rope_parameters": LINEAR, "model_type": "gemma3_text"}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": {"full_attention": LINEAR}}, 2048),
        ({"max_position_embeddings": 512, "rope_parameters": LINEAR | {"factor": "4"}}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": LINEAR | {"factor": 1e300}}, 512),
        ({"max_position_embeddings": 512, "rope_parameters": [4]}, 512),
    ],
)
def test_tokens(text: dict[str, Any], tokens: int | None) -> None:
    """Linear and dynamic scaling state the length before."""
    assert reach(text) == tokens
