"""Small models of every family's config: what is kept, what divides, what is named as in the source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint.shipped import ShippedHeaders
from compressor.dialects import DIALECTS
from compressor.errors import CheckpointError, UserError
from compressor.model.families import family_for
from compressor.planner.claims import claim_tensors
from compressor.recipe.model import WeightsSection
from compressor.smoke.config import SmallConfig, parsed, small_config
from compressor.smoke.folder import BYTE_TOKENS
from compressor.smoke.layers import KeptLayers, decoder_path, is_index_list, kept_layers, without_numbers
from compressor.smoke.tensors import small_headers
from compressor.spec import TensorHeader
from compressor.stages.base import Claim

from .full_size import CONFIGS, write_headers

WEIGHTS = WeightsSection.model_validate({"scheme": "fp8_dynamic"})
# Kept layers of the decoder, and what they are.
KEPT = {
    "llama": {"self_attn + mlp": 2},
    "llama4": {
        "self_attn + feed_forward with experts + chunked_attention": 3,
        "self_attn + feed_forward with experts + full_attention + without rope": 1,
    },
    "maverick_text": {
        "self_attn + feed_forward + chunked_attention": 2,
        "self_attn + feed_forward with experts + chunked_attention": 1,
        "self_attn + feed_forward with experts + full_attention + without rope": 1,
    },
    "mixtral": {"self_attn + block_sparse_moe with experts": 2},
    "qwen3_moe": {"self_attn + mlp with experts": 2},
    "qwen3_next": {
        "mlp with experts + linear_attn + linear_attention": 3,
        "self_attn + mlp with experts + full_attention": 1,
    },
    "qwen3_5_moe": {
        "mlp with experts + linear_attn + linear_attention": 3,
        "self_attn + mlp with experts + full_attention": 1,
    },
    "jamba": {
        "mamba + feed_forward": 2,
        "mamba + feed_forward with experts": 2,
        "self_attn + feed_forward": 1,
    },
    "deepseek_v3": {"self_attn + mlp": 3, "self_attn + mlp with experts": 1},
    "glm4_moe": {"self_attn + mlp": 1, "self_attn + mlp with experts": 1},
    "gemma3": {"self_attn + mlp + sliding_attention": 5, "self_attn + mlp + full_attention": 1},
    "gpt_oss": {
        "self_attn + mlp with experts + sliding_attention": 1,
        "self_attn + mlp with experts + full_attention": 1,
    },
    "nemotron_h": {
        "mixer + linear_attention": 1,
        "mixer with experts + moe": 1,
        "mixer + full_attention": 1,
        "mixer + mlp": 1,
    },
    "qwen2": {"self_attn + mlp + full_attention": 2},
    "phi3": {"self_attn + mlp": 2},
}


@dataclass(frozen=True)
class Shrunk:
    """A model of full size and the small one made of it."""

    source: ShippedHeaders
    claims: list[Claim]
    layers: KeptLayers
    config: SmallConfig
    headers: dict[str, TensorHeader]


def _claims(config: dict[str, Any], headers: Any, weights: WeightsSection = WEIGHTS) -> list[Claim]:
    dialect = DIALECTS["compressed-tensors"]
    return claim_tensors(headers, config, family_for(config), weights, dialect)


def _shrunk(source: ShippedHeaders, weights: WeightsSection = WEIGHTS) -> Shrunk:
    claims = _claims(source.config, source.headers, weights)
    layers = kept_layers(claims, parsed(source.config, "here").get_text_config(), "here")
    config = small_config(source.config, layers.kept, BYTE_TOKENS, "here")
    blocks = (decoder_path(claims), layers.total)
    headers = small_headers(source.headers, config.raw, blocks, "here")
    return Shrunk(source, claims, layers, config, headers)


@pytest.fixture(scope="module", params=CONFIGS)
def shrunk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Shrunk]:
    """Name of the family, and its model shrunk."""
    folder = tmp_path_factory.mktemp(request.param) / "headers"
    return request.param, _shrunk(ShippedHeaders(write_headers(folder, CONFIGS[request.param]())))


def test_a_layer_of_every_kind(shrunk: tuple[str, Shrunk]) -> None:
    """The first layers are kept until every kind has come, and none more than that needs."""
    name, made = shrunk
    assert dict(made.layers.kinds) == KEPT[name]
    text = parsed(made.config.raw, "here").get_text_config()
    full = parsed(made.source.config, "here").get_text_config()
    assert text.num_hidden_layers == made.layers.kept
    for key, value in full.to_dict().items():
        if (
            isinstance(value, list)
            and len(value) == made.layers.total
            and not is_index_list(value, len(value))
        ):
            assert getattr(text, key) == value[: made.layers.kept], key


def test_names_are_the_sources(shrunk: tuple[str, Shrunk]) -> None:
    """Every tensor is one of the source's, in its dtype and dimensions; no kind of tensor is lost."""
    _, made = shrunk
    for name, header in made.headers.items():
        full = made.source.headers[name]
        assert (header.dtype, len(header.shape)) == (full.dtype, len(full.shape)), name
        assert all(few <= many for few, many in zip(header.shape, full.shape, strict=True)), name
    kinds = {without_numbers(name) for name in made.source.headers}
    assert {without_numbers(name) for name in made.headers} == kinds


def test_roles_and_tiles_are_the_sources(shrunk: tuple[str, Shrunk]) -> None:
    """Each matrix is claimed as in the source, and its sides have the same part of a tile of 128."""
    _, made = shrunk
    full = {claim.tensor.name: claim for claim in made.claims}
    for claim in _claims(made.config.raw, made.headers):
        source = full[claim.tensor.name]
        assert (claim.action, claim.role.kind) == (source.action, source.role.kind), claim.tensor.name
        parts = {part.module: part for part in source.role.parts}
        for part in claim.role.parts:
            if claim.role.kind == "linear":
                for side in ("in_features", "out_features"):
                    few, many = getattr(part, side), getattr(parts[part.module], side)
                    assert gcd(few, 128) == gcd(many, 128), (part.module, side, few, many)


def test_it_is_small(shrunk: tuple[str, Shrunk]) -> None:
    """Whatever the source's size."""
    _, made = shrunk
    assert sum(header.numel for header in made.headers.values()) < 20e6


def _source(folder: Path, headers: dict[str, tuple[int, ...]], raw: dict[str, Any]) -> ShippedHeaders:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = [[name, "BF16", shape] for name, shape in headers.items()]
    (folder / "tensors.json").write_text(json.dumps({"source": "test", "tensors": tensors}))
    return ShippedHeaders(folder)


def _with(folder: Path, name: str, extra: dict[str, tuple[int, ...]]) -> ShippedHeaders:
    """A family's headers and further ones."""
    found = ShippedHeaders(write_headers(folder, CONFIGS[name]()))
    shapes = {header.name: header.shape for header in found.headers.values()}
    return _source(folder, shapes | extra, found.config)


def test_tensors_that_transformers_does_not_know(tmp_path: Path) -> None:
    """Prediction layers stay: under ``mtp`` as they are, blocks behind the last behind the kept ones."""
    extra = {
        "mtp.fc.weight": (2048, 4096),
        "mtp.layers.0.mlp.experts.3.down_proj.weight": (2048, 512),
        "mtp.layers.0.mlp.experts.9.down_proj.weight": (2048, 512),
    }
    made = _shrunk(_with(tmp_path / "next", "qwen3_next", extra))
    assert made.headers["mtp.fc.weight"].shape == (256, 512)
    assert made.headers["mtp.layers.0.mlp.experts.3.down_proj.weight"].shape == (256, 128)
    assert "mtp.layers.0.mlp.experts.9.down_proj.weight" not in made.headers

    made = _shrunk(_with(tmp_path / "v3", "deepseek_v3", {"model.layers.12.eh_proj.weight": (7168, 14336)}))
    assert made.layers.kept == 4
    assert made.headers["model.layers.4.eh_proj.weight"].shape == (256, 512)


def test_names_of_older_checkpoints(tmp_path: Path) -> None:
    """As the published Gemma 3 has them: the loader renames them, and the small model keeps them."""
    found = ShippedHeaders(write_headers(tmp_path / "h", CONFIGS["gemma3"]()))
    shapes = {
        name.replace("vision_tower.", "vision_tower.vision_model."): header.shape
        for name, header in found.headers.items()
    }
    made = _shrunk(_source(tmp_path / "old", shapes, found.config))
    assert {without_numbers(name) for name in made.headers} == {without_numbers(name) for name in shapes}
    assert all(name in shapes for name in made.headers)


def test_layers_that_the_recipe_treats_otherwise(tmp_path: Path) -> None:
    """An early layer with a scheme of its own is kept; a late one is not; something is always quantized."""
    source = ShippedHeaders(write_headers(tmp_path / "h", CONFIGS["llama"]()))

    def kept(**weights: Any) -> int:
        section = WeightsSection.model_validate({"scheme": "fp8_dynamic", **weights})
        return _shrunk(source, section).layers.kept

    assert kept(rules=[{"match": "*.layers.5.*_proj", "scheme": "nvfp4a16"}]) == 6
    assert kept(rules=[{"match": "*.layers.40.*_proj", "scheme": "nvfp4a16"}]) == 2
    assert kept(ignore=["re:.*layers[.][0-9][.].*"]) == 11


def test_faults(tmp_path: Path) -> None:
    """What cannot be shrunk is refused in one sentence."""
    shapes = {"model.layers.0.mlp.up_proj.weight": (64, 64), "model.layers.1.mlp.up_proj.weight": (64, 64)}
    llama = {"model_type": "llama", "num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(CheckpointError, match="cannot read its config"):
        _shrunk(_source(tmp_path, shapes, llama | {"model_type": "nobody_knows"}))
    with pytest.raises(UserError, match="block 2 of 3 has no tensors"):
        _shrunk(_source(tmp_path, shapes, llama | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="other names than transformers saves"):
        _shrunk(_source(tmp_path, shapes, llama))
    with pytest.raises(CheckpointError, match="code from the Hub is never run"):
        _shrunk(_source(tmp_path, shapes, llama | {"attn_implementation": "org/kernel"}))
