"""Generation past the original length, with a cache: why short and long factors must be equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.rope.scaled import scaled_config
from compressor.rope.spec import ContextSpec
from tests.tiny import tiny_llama

ORIGINAL, TARGET = 64, 256
FACTORS = tuple(1.0 + index / 2 for index in range(8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of head_dim 16."""
    return tiny_llama(tmp_path_factory.mktemp("cached"), dtype=torch.float32)


def _gap(folder: Path, parameters: dict[str, Any], limit: int) -> float:
    """Largest difference of logits between one pass and one that crosses the original length by a cache."""
    config = LlamaConfig.from_pretrained(folder, rope_parameters=parameters, max_position_embeddings=limit)
    model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    tokens_BT = torch.randint(1, 250, (1, ORIGINAL + 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(tokens_BT).logits[0, -1]
        kept = model(tokens_BT[:, : ORIGINAL - 4], use_cache=True).past_key_values
        for place in range(ORIGINAL - 4, ORIGINAL + 8):
            told = model(tokens_BT[:, place : place + 1], past_key_values=kept, use_cache=True)
    return float((told.logits[0, -1] - whole).abs().max())


def test_across_the_original_length(folder: Path) -> None:
    """What is written generates as one pass reads; with factors that switch, transformers does not."""
    source = LlamaConfig.from_pretrained(folder).to_dict() | {"max_position_embeddings": ORIGINAL}
    result = scaled_config(source, ContextSpec("longrope", TARGET, factors=FACTORS))
    parameters: Any = result.config["rope_parameters"]
    assert _gap(folder, parameters, TARGET) < 1e-3
    assert _gap(folder, parameters | {"short_factor": [1.0] * 8}, TARGET) > 0.1


@pytest.mark.parametrize("method", ["yarn", "linear", "ntk", "llama3"])
def test_static_methods(folder: Path, method: Any) -> None:
    """The same frequencies for every text."""
    source = LlamaConfig.from_pretrained(folder).to_dict() | {"max_position_embeddings": ORIGINAL}
    result = scaled_config(source, ContextSpec(method, TARGET))
    limit: Any = result.config["max_position_embeddings"]
    parameters: Any = result.config["rope_parameters"]
    assert _gap(folder, parameters, limit) < 1e-3
