"""What is told of a checkpoint: against plans, against what was built, and against nonsense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from compressor.checkpoint.opened import Opened, open_any, open_folder
from compressor.checkpoint.taken_apart import StoredTensor
from compressor.data import shipped_root
from compressor.errors import UserError
from compressor.planner.plan import make_plan
from compressor.recipe.load import load_recipe
from compressor.report.contents import Contents, contents_of
from compressor.report.engines import TRANSFORMERS_METHODS
from compressor.stages.modules import modules_of
from tests.checkpoint.tiny_gguf import tiny_gguf
from tests.planner.test_hostile_config import ANY, KNOWN
from tests.tiny import tiny_llama

SCHEMES = (
    *("nvfp4a16", "nvfp4", "mxfp4", "fp8_dynamic", "fp8_block", "fp8_static"),
    *("{kind: int4, group_size: 32}", "{kind: int4, group_size: 32, symmetric: false}", "int8"),
    "{kind: int8, activations: dynamic}",
)
PUBLISHED = sorted(path.name for path in (shipped_root() / "recipes" / "configs").iterdir())


def planned(recipe: str, *overrides: str) -> tuple[Opened, Any]:
    """What the plan of a recipe will write, as if it lay there, and its prediction."""
    plan = make_plan(load_recipe(recipe, overrides))
    outputs = [output for claim in plan.claims for output in claim.outputs]
    tensors = tuple(StoredTensor(one.name, one.dtype, one.shape, one.nbytes) for one in outputs)
    described = plan.dialect.describe(modules_of(plan.source, plan.claims)).quantization_config
    config = plan.source.config | {"quantization_config": dict(described)}
    opened = Opened("planned", "folder", config, tensors, {}, frozenset(), lambda _: b"")
    return opened, plan


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_bits_are_those_of_the_plan(scheme: str, dialect: str) -> None:
    """Both definitions, parameters and schemes of everything that a run writes."""
    overrides = (f"weights.scheme={scheme}", f"export.format={dialect}", "weights.solver=rtn")
    try:
        opened, plan = planned("recipes/smollm2-nvfp4.yaml", *overrides)
    except UserError:
        assert dialect == "modelopt" or "block" in scheme  # 576 is no multiple of 128
        return
    found = contents_of(opened)
    assert found.parameters.total == plan.prediction.parameters
    assert found.parameters.target == plan.prediction.target_parameters
    assert found.bits_per_weight == pytest.approx(plan.prediction.bits_per_weight, rel=1e-12)
    assert found.bits_per_target_weight == pytest.approx(plan.prediction.bits_per_target_weight, rel=1e-12)
    labels = {claim.stored.label for claim in plan.claims if claim.stored}
    # The difference lies in what engines do with inputs.
    assert {row.scheme for row in found.rows} - {"BF16", "F32"} <= labels | {"MXFP4"}


@pytest.mark.parametrize(
    "recipe", ["recipes/maverick-nvfp4.yaml", "recipes/qwen3-moe-int4.yaml", "recipes/jamba-fp8.yaml"]
)
def test_published_models(recipe: str) -> None:
    """Experts that are written one by one come to what was planned."""
    opened, plan = planned(recipe)
    found = contents_of(opened)
    assert found.parameters.total == plan.prediction.parameters
    assert found.bits_per_weight == pytest.approx(plan.prediction.bits_per_weight, rel=1e-12)
    assert found.bits_per_target_weight == pytest.approx(plan.prediction.bits_per_target_weight, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_headers(name: str) -> None:
    """Every one is told; each weight stands in one row; what is active is a part of all."""
    found = contents_of(open_any(f"recipes/configs/{name}"))
    assert sum(row.bytes for row in found.rows) == found.inventory.bytes
    assert sum(one["bytes"] for one in found.dtypes.values()) == found.inventory.bytes
    assert sum(row.parameters for row in found.rows) == found.parameters.total
    assert found.kv_cache.reason == ""
    if found.parameters.active is not None:
        assert found.parameters.active < found.parameters.total
    json.dumps(found.to_json())


def test_what_makers_say() -> None:
    """Total and active parameters as published: Maverick 400B with 17B, DeepSeek-V3 37B and its MTP layer."""
    maverick = contents_of(open_any("recipes/configs/llama-4-maverick"))
    assert round(maverick.parameters.total / 1e9) == 402
    assert round((maverick.parameters.active or 0) / 1e9) == 17
    deepseek = contents_of(open_any("recipes/configs/deepseek-v3"))
    assert round((deepseek.parameters.active or 0) / 1e9) in (37, 38)
    assert deepseek.predictions == {"layers": 1, "tensors": 788}
    assert deepseek.method == "fp8"
    assert deepseek.experts == {"count": 256, "per_token": 8}


def test_gguf(tmp_path: Path) -> None:
    """Types of ggml by part of the model; of architectures that are not read too."""
    known = contents_of(open_any(str(tiny_gguf(tmp_path / "a.gguf"))))
    schemes = {row.role: row.scheme for row in known.rows}
    assert schemes["attention"] == schemes["MLP"] == schemes["embedding"] == "Q8_0"
    assert known.bits_per_target_weight == 8.5
    assert known.tied
    assert known.kv_cache.bytes_per_token_16bit == 2 * 2 * 2 * 32 * 2  # layers, K and V, heads, size, bytes
    other = contents_of(open_any(str(_renamed(tiny_gguf(tmp_path / "b.gguf")))))
    assert other.family == "generic"
    assert {row.role for row in other.rows} >= {"embedding"}
    assert other.parameters.total == known.parameters.total
    assert [loader.loads for loader in other.engines if loader.engine == "compress"] == ["no"]


def _renamed(path: Path) -> Path:
    """The same file as of an architecture that nobody knows; the name is as long."""
    raw = path.read_bytes().replace(b"llama", b"xlama")
    path.write_bytes(raw)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain model."""
    return tiny_llama(tmp_path / "model", tie=True)


def test_plain_folder(folder: Path) -> None:
    """Nothing quantized, 16 bits, the head tied."""
    found = contents_of(open_folder(folder))
    assert (found.method, found.form, found.tied) == ("", "folder", True)
    assert found.bits_per_weight == found.bits_per_target_weight == 16
    assert found.experts == {"count": None, "per_token": None}
    assert found.parameters.active is None
    assert found.draft is found.adapter is None
    assert [loader.loads for loader in found.engines] == ["yes"] * 3


def test_what_lies_beside(folder: Path) -> None:
    """A draft head, an adapter, a plan and scales of the cache."""
    for name, content in {
        "draft/config.json": {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": 32,
            "num_hidden_layers": 1,
        },
        "adapter/adapter_config.json": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]},
        "kv_plan.json": {"layers": [{"format": "fp8"}, {"format": "fp8"}, 3]},
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    tensors = load_file(folder / "model.safetensors")
    scale = tensors["model.norm.weight"][:1].clone()
    save_file({**tensors, "model.layers.0.self_attn.k_scale": scale}, folder / "model.safetensors")
    found = contents_of(open_folder(folder))
    assert found.draft is not None
    assert (found.draft.architecture, found.draft.vocabulary) == ("LlamaForCausalLMEagle3", 32)
    assert found.adapter is not None
    assert (found.adapter.rank, found.adapter.targets) == (16, ("q_proj",))
    assert (found.kv_cache.format, found.kv_cache.stated_in) == ("fp8 (2 layers)", "kv_plan.json")
    assert found.kv_cache.scales == 1
    assert found.bits_per_weight == 16


def test_adapter_alone(folder: Path, tmp_path: Path) -> None:
    """A folder of peft, without a config of the model."""
    alone = tmp_path / "adapter"
    alone.mkdir()
    shutil.copy(folder / "model.safetensors", alone / "adapter_model.safetensors")
    (alone / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": "org/model"}))
    found = contents_of(open_folder(alone))
    assert found.form == "adapter"
    assert found.adapter is not None
    assert (found.adapter.rank, found.adapter.base) == (8, "org/model")


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json", "hf_quant_config.json"])
def test_older_descriptions(folder: Path, name: str) -> None:
    """Of AutoAWQ, AutoGPTQ and ModelOpt, beside a config.json that says nothing."""
    content = {
        "bits": 4,
        "w_bit": 4,
        "quantization": {"quant_algo": "NVFP4"},
        "producer": {"name": "modelopt"},
    }
    (folder / name).write_text(json.dumps(content))
    method = {"quant_config.json": "awq", "quantize_config.json": "gptq"}.get(name, "modelopt")
    found = contents_of(open_folder(folder))
    assert found.method == method
    assert found.made_by == "modelopt"
    assert found.bits_per_weight is None  # nothing in it is packed as it says
    assert "bits per weight are left out" in found.notes[0]


def test_methods_are_those_of_the_library() -> None:
    """The installed transformers has them, by these names."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    assert {
        name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING
    } == TRANSFORMERS_METHODS


def _told(config: dict[str, Any]) -> Contents | None:
    tensors = tuple(
        StoredTensor(name, "BF16", shape, 2)
        for name, shape in (
            ("model.layers.0.self_attn.q_proj.weight", (16, 16)),
            ("model.layers.0.mlp.experts.gate_up_proj", (2, 16, 15)),
            ("model.embed_tokens.weight", (32, 16)),
            ("lm_head.weight", (32, 16)),
        )
    )
    try:
        return contents_of(Opened("x", "folder", config, tensors, {}, frozenset(), lambda _: b""))
    except UserError:
        return None


@settings(max_examples=150, deadline=None)
@given(config=ANY | KNOWN)
def test_hostile_configs(config: dict[str, Any]) -> None:
    """Whatever a config holds that could be loaded: a message, or something that can be written as JSON."""
    from compressor.checkpoint.layout import load_config

    try:
        loaded = load_config(json.dumps(config).encode(), "config.json")
    except UserError:
        return
    found = _told(loaded)
    assert found is None or json.dumps(found.to_json())
