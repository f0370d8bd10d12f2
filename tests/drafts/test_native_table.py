"""Names of published checkpoints: prediction tensors are told, placed, claimed; what cannot run says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint.base import Source
from compressor.checkpoint.dequantized import DequantizedSource
from compressor.checkpoint.layout import stated_quantization
from compressor.checkpoint.shipped import ShippedHeaders
from compressor.dialects import DIALECTS
from compressor.drafts.native_table import (
    MIMO,
    layer_count,
    native_family,
    prediction_names,
    runnable_family,
)
from compressor.errors import CheckpointError
from compressor.model.families import family_for
from compressor.planner.claims import claim_tensors
from compressor.recipe.model import WeightsSection
from compressor.spec import TensorHeader
from compressor.stages.assemble import check_sources
from compressor.stages.base import Shard, Unit

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
NORMS = ("input_layernorm", "post_attention_layernorm")

# As Xiaomi publishes MiMo-7B (vLLM 0.32 mimo_mtp.py reads them so): a Qwen2 block and what is around it.
MIMO_CONFIG = {
    "model_type": "mimo",
    "num_hidden_layers": 36,
    "num_nextn_predict_layers": 1,
    "hidden_size": 64,
}
MIMO_LAYER = [
    *(f"{name}.weight" for name in (*NORMS, "token_layernorm", "hidden_layernorm", "final_layernorm")),
    "input_proj.weight",
    *(f"self_attn.{kind}_proj.{leaf}" for kind in "qkv" for leaf in ("weight", "bias")),
    "self_attn.o_proj.weight",
    *(f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")),
]


def mimo_headers() -> dict[str, TensorHeader]:
    """One ordinary block, the ends, and the prediction layer."""
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"]
    names += [f"model.mtp_layers.0.{name}" for name in MIMO_LAYER]
    wide = ("proj.weight", "embed_tokens.weight", "lm_head.weight")
    return {name: TensorHeader(name, "BF16", (64, 64) if name.endswith(wide) else (64,)) for name in names}


@pytest.mark.parametrize(
    ("name", "count"), [("qwen3-next-80b-a3b", 17 + 512 * 3), ("deepseek-v3", 20 + 256 * 3)]
)
def test_shipped_headers_are_placed_to_the_last_tensor(name: str, count: int) -> None:
    """Every prediction tensor lies under the block, is one of the modules beside it, or copies an end."""
    source: Source = ShippedHeaders(CONFIGS / name, quantized=True)
    if stated_quantization(source.config):
        source = DequantizedSource(source)
    headers, config = source.headers, source.config
    family = runnable_family(headers, config)
    assert layer_count(family, config) == 1
    beside = {
        f"{family.named(pattern, config)}.weight"
        for pattern in (family.embedding_norm, family.hidden_norm, family.projection, family.last_norm)
    } | {family.named(copied, config) for copied in family.copies}
    found = set(prediction_names(headers, config))
    assert beside <= found
    block = family.named(family.block, config)
    assert all(told.startswith(block) for told in found - beside)
    marked = {told for told in headers if told.startswith(("mtp.", "model.layers.61."))}
    assert found == marked
    assert len(found) == count


def test_a_lost_tensor_of_mimo_is_found() -> None:
    """Each of its tensors is claimed as a copy; a plan that lacks one of them is refused."""
    headers = mimo_headers()
    weights = WeightsSection.model_validate({"scheme": "nvfp4a16"})
    dialect = DIALECTS["compressed-tensors"]
    claims = claim_tensors(headers, MIMO_CONFIG, family_for(MIMO_CONFIG), weights, dialect)
    source = FakeSource(headers)
    check_sources(source, [Shard((Unit(tuple(claims)),))])  # type: ignore[arg-type]
    for name in prediction_names(headers, MIMO_CONFIG):
        (claim,) = [claim for claim in claims if claim.tensor.name == name]
        assert (claim.action, claim.outputs) == ("copy", (headers[name],))
        rest = tuple(claim for claim in claims if claim.tensor.name != name)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            check_sources(source, [Shard((Unit(rest),))])  # type: ignore[arg-type]


@dataclass
class FakeSource:
    """What assembling asks of a source."""

    headers: dict[str, TensorHeader]
    label: str = "MiMo"


def test_mimo_is_carried_and_says_why_it_is_not_run() -> None:
    """All of its tensors are prediction tensors with a place; running it is refused with the reason."""
    headers = mimo_headers()
    found = prediction_names(headers, MIMO_CONFIG)
    assert found == tuple(f"model.mtp_layers.0.{name}" for name in MIMO_LAYER)
    assert native_family(MIMO_CONFIG) is MIMO
    beside = {
        MIMO.named(pattern, MIMO_CONFIG)
        for pattern in (MIMO.embedding_norm, MIMO.hidden_norm, MIMO.projection, MIMO.last_norm)
    }
    assert {f"{module}.weight" for module in beside} <= set(found)
    with pytest.raises(CheckpointError, match="model_type 'mimo' are not run: transformers has no MiMo"):
        runnable_family(headers, MIMO_CONFIG)


QWEN = {"model_type": "qwen3_next", "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "num_hidden_layers": 2}, "'llama' are not run"),
        ({**QWEN, "num_nextn_predict_layers": 0}, "no prediction layer"),
        ({**QWEN, "num_nextn_predict_layers": "1"}, "not a number of layers"),
        ({**QWEN, "num_nextn_predict_layers": True}, "not a number of layers"),
        ({"model_type": "qwen3_5_text", "num_hidden_layers": 2}, "no mtp_num_hidden_layers"),
        ({"model_type": "glm4_moe", "num_hidden_layers": 2}, "no num_nextn_predict_layers"),
    ],
)
def test_configs_that_name_no_layer_are_refused(config: dict[str, Any], message: str) -> None:
    """Of another architecture, or without the key that engines read."""
    headers = {"mtp.fc.weight": TensorHeader("mtp.fc.weight", "BF16", (4, 8))}
    with pytest.raises(CheckpointError, match=message):
        runnable_family(headers, config)


def test_a_layer_that_was_dropped_is_told() -> None:
    """The config promises one and the tensors lack it, as a model is that transformers has saved."""
    header = TensorHeader("model.norm.weight", "BF16", (4,))
    with pytest.raises(CheckpointError, match="no prediction layer"):
        runnable_family({header.name: header}, {**QWEN, "num_nextn_predict_layers": 1})
    assert layer_count(native_family(QWEN), QWEN) == 1  # type: ignore[arg-type]
