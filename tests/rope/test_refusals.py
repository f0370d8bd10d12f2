"""What is refused, with which reason, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.errors import UserError
from compressor.rope.scaled import scaled_config
from compressor.rope.spec import ContextSpec
from tests.rope.test_scaled import FAMILIES, LLAMA

ONES = (1.0,) * 32
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31 = LLAMA | {
    "max_position_embeddings": 131072,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def _without(*keys: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in LLAMA.items() if key not in keys} | more


def _refused(config: dict[str, Any], spec: ContextSpec) -> UserError:
    with pytest.raises(UserError) as caught:
        scaled_config(config, spec)
    return caught.value


@pytest.mark.parametrize(
    ("spec", "where", "told"),
    [
        (ContextSpec("yarn", 8192), "target_length", "not more than the original length"),
        (ContextSpec("yarn", 0), "target_length", "not a number of tokens"),
        (ContextSpec("yarn", 2**40), "target_length", "not a number of tokens"),
        (ContextSpec("yarn", 2**31 - 1), "target_length", "times the original length"),
        (ContextSpec("yarn", 32768, original_length=16384), "original_length", "more than max_position"),
        (ContextSpec("yarn", 32768, original_length=True), "original_length", "not a number of tokens"),
        (ContextSpec("yarn", 32768, factor=2.0), "factor", "16384, less than target_length 32768"),
        (ContextSpec("yarn", 32768, factor=0.5), "factor", "not a number above 1"),
        (ContextSpec("yarn", 32768, factor=float("nan")), "factor", "not a number above 1"),
        (ContextSpec("yarn", 32768, factor="4"), "factor", "not a number above 1"),  # type: ignore[arg-type]
        (ContextSpec("yarn", 32768, factors=ONES), "factors", "only longrope"),
        (ContextSpec("longrope", 32768), "factors", "needs factors"),
        (ContextSpec("longrope", 32768, factors=ONES[:1]), "factors", "single one for every frequency"),
        (ContextSpec("longrope", 32768, factors=ONES * 2), "factors", "64 factors, the model 32"),
        (ContextSpec("longrope", 32768, factors=(0.9, *ONES[1:])), "factors", "factor 0 is 0.9"),
        (ContextSpec("longrope", 32768, factors=(*ONES[1:], float("inf"))), "factors", "factor 31 is inf"),
        (ContextSpec("longrope", 32768, factors=(*ONES[1:], True)), "factors", "factor 31 is True"),
        (ContextSpec("yarn", 32768, attention_factor=1.1), "attention_factor", "is 1.1 for yarn"),
        (ContextSpec("longrope", 32768, factors=ONES, attention_factor=0.0), "attention_factor", "is 0.0"),
        (ContextSpec("dynamic", 32768), "method", "vLLM does not serve dynamic"),
        (ContextSpec("su", 32768), "method", "is none of"),  # type: ignore[arg-type]
    ],
)
def test_specs(spec: ContextSpec, where: str, told: str) -> None:
    """That contradict themselves or the model."""
    error = _refused(LLAMA, spec)
    assert error.where == f"context.{where}"
    assert told in error.what


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (_without("rope_theta", model_type="gpt2"), "no rotary positions"),
        (_without("rope_theta", model_type="mamba"), "no rotary positions"),
        (FAMILIES["falcon"] | {"alibi": True}, "no rotary positions"),
        (FAMILIES["granite"] | {"position_embedding_type": "nope"}, "position_embedding_type is 'nope'"),
        (LLAMA | {"model_type": "codegen"}, "are fixed"),
        (LLAMA | {"model_type": "llama4_text"}, "chunks of 8192"),
        ({"model_type": "llama4", "text_config": LLAMA | {"model_type": "llama4_text"}}, "chunks of 8192"),
        (LLAMA | {"model_type": "recurrent_gemma"}, "within a window alone"),
        (LLAMA | {"model_type": "ernie4_5_vl_moe_text"}, "no scaling but a raised theta"),
        (
            LLAMA | {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e6}},
            "ignores their factor",
        ),
        (LLAMA | {"rope_theta": "10000"}, "rope_theta is '10000'"),
        (LLAMA | {"rope_theta": 10**400}, "rope_theta is 1000"),
        (LLAMA | {"rope_theta": float("nan")}, "rope_theta is nan"),
        (LLAMA | {"head_dim": 2**40}, "head_dim is"),
        (LLAMA | {"head_dim": 63}, "63 dimensions of a head are turned"),
        (LLAMA | {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (LLAMA | {"max_position_embeddings": "many"}, "max_position_embeddings is 'many'"),
        (LLAMA | {"rope_parameters": [1]}, "rope_parameters is [1], no JSON object"),
        (LLAMA | {"rope_parameters": {"rope_theta": 1e4, "full_attention": {}}}, "mixes fields with kinds"),
        (LLAMA | {"rope_parameters": {"main": {}, "full_attention": {}}}, "2 kinds of layers"),
        (_without("max_position_embeddings"), "the length of the training is not known"),
        (
            LLAMA | {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "default", "x": 1}},
            "transformers takes the first",
        ),
    ],
)
def test_models(config: dict[str, Any], told: str) -> None:
    """Without positions that can be scaled, or whose config cannot be read."""
    assert told in _refused(config, ContextSpec("yarn", 32768)).what


@pytest.mark.parametrize(
    ("name", "method", "told"),
    [
        ("phi3", "yarn", "no scaling but longrope"),
        ("phimoe", "linear", "no scaling but longrope"),
        ("deepseek_v3", "llama3", "latent attention"),
        ("qwen3_5", "linear", "mrope_section"),
        ("qwen2_5_vl", "yarn", "four times the original length"),
        ("gemma3-nested", "longrope", "second text past"),
    ],
)
def test_methods_of_families(name: str, method: Any, told: str) -> None:
    """That engines read as something else, with others to take."""
    error = _refused(FAMILIES[name], ContextSpec(method, 32768))
    assert told in error.what
    assert "ntk" in error.fix


def test_neighbouring_pairs_have_no_longrope() -> None:
    """vLLM raises there."""
    error = _refused(LLAMA | {"model_type": "glm4"}, ContextSpec("longrope", 32768, factors=ONES))
    assert "neighbouring" in error.what
    latent = FAMILIES["deepseek_v3"] | {"model_type": "minicpm3"}
    assert "ways of their own" in _refused(latent, ContextSpec("yarn", 32768)).what


@pytest.mark.parametrize(
    ("config", "spec", "told"),
    [
        (LLAMA31, ContextSpec("yarn", 131072), "reads 131072 tokens already: it is scaled by llama3"),
        (LLAMA31, ContextSpec("yarn", 262144), "no longer those that yarn counts from"),
        (LLAMA31, ContextSpec("llama3", 262144, original_length=4096), "not what the source is scaled from"),
        (
            LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            ContextSpec("linear", 12000),
            "reads 16384 tokens already",
        ),
        (
            LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            ContextSpec("linear", 65536),
            "does not say from which length",
        ),
        (
            LLAMA | {"max_position_embeddings": 32768, "rope_parameters": YARN | {"attention_factor": 1.2}},
            ContextSpec("yarn", 65536),
            "attention_factor of its own",
        ),
        (
            LLAMA | {"max_position_embeddings": 50000, "rope_parameters": YARN},
            ContextSpec("yarn", 65536),
            "vLLM has no positions beyond",
        ),
    ],
)
def test_scaled_already(config: dict[str, Any], spec: ContextSpec, told: str) -> None:
    """A second scaling means nothing but the same one made longer."""
    assert told in _refused(config, spec).what


def test_llama31_can_only_be_made_longer_by_its_own() -> None:
    """The factor counts from 8192 tokens; without one it grows with the text."""
    result = scaled_config(LLAMA31, ContextSpec("llama3", 262144))
    parameters: Any = result.config["rope_parameters"]
    assert (parameters["factor"], parameters["original_max_position_embeddings"]) == (32.0, 8192)
    assert result.config["max_position_embeddings"] == 262144
