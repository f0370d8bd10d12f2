"""Starter recipes: a plan accepts each as written, of every family, GPU and goal; choices and reasons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compressor.data import shipped_root
from compressor.errors import UserError
from compressor.planner.plan import Plan, make_plan
from compressor.planner.starter import gpu_named, make_starter
from compressor.planner.starter_parts import Goal
from compressor.planner.starter_text import planned_text, starter_text
from compressor.recipe.gpus import DEFAULT_GPU
from compressor.recipe.load import load_recipe
from tests.model.compressed import compress_folder
from tests.model.zoo import FAMILIES, REFUSED
from tests.tiny import tiny_llama

CONFIGS = shipped_root() / "recipes" / "configs"
# With 75,000 tensors and more a plan takes seconds; DeepSeek-V3 has a test below.
MANY = {"deepseek-v3", "qwen3-next-80b-a3b"}
PUBLISHED = [
    pytest.param(path.name, marks=[pytest.mark.slow] if path.name in MANY else [])
    for path in sorted(CONFIGS.iterdir())
]
# One of each kind of arithmetic.
GPUS = ("b200-180gb", "h100-80gb", "a100-80gb")
# Nothing of it may be quantized: its matrices are stored transposed.
NOTHING = {"gpt2"}
MAKERS = {**FAMILIES, **{name: maker for name, (maker, _) in REFUSED.items()}}


def planned(model: str, folder: Path, gpu: str = DEFAULT_GPU, goal: Goal = "memory") -> tuple[Plan, str]:
    """The plan of the starter as it was written, and its text."""
    text = planned_text(make_starter(model, gpu_named(gpu), goal))
    path = folder / "starter.yaml"
    path.write_text(text)
    return make_plan(load_recipe(str(path))), text


@pytest.mark.parametrize("name", MAKERS)
def test_every_family(name: str, tmp_path: Path) -> None:
    """A plan of a tiny one, which needs other groups than published widths do."""
    model = MAKERS[name](tmp_path / "model")
    if name in NOTHING:
        with pytest.raises(UserError, match="can be stored in fewer bits"):
            planned(str(model), tmp_path)
        return
    plan, text = planned(str(model), tmp_path)
    assert plan.prediction.bits_per_target_weight < 16
    assert all(len(line) <= 110 for line in text.splitlines() if line.startswith("#"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str, tmp_path: Path) -> None:
    """By default nothing that the GPU has no arithmetic for, and at most 5 bits a quantized weight."""
    plan, text = planned(f"recipes/configs/{name}", tmp_path)
    assert plan.prediction.bits_per_target_weight < 5
    assert "Left out, since the plan refuses" not in text
    assert plan.source.note.startswith("planned from shipped headers") or plan.source.kind == "headers"


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("goal", ["memory", "speed", "quality"])
def test_what_the_gpu_multiplies(gpu: str, goal: Goal, tmp_path: Path) -> None:
    """4-bit floats on Blackwell; integers and FP8 on Hopper; integers on Ampere, 8-bit ones for speed."""
    expected = {
        "b200-180gb": {"memory": "NVFP4", "speed": "NVFP4", "quality": "FP8_DYNAMIC"},
        "h100-80gb": {"memory": "W4A16 g128", "speed": "FP8_DYNAMIC", "quality": "FP8_DYNAMIC"},
        "a100-80gb": {"memory": "W4A16 g128", "speed": "W8A8", "quality": "W8A16"},
    }
    plan, _ = planned("recipes/configs/llama-3.3-70b", tmp_path, gpu, goal)
    assert {claim.stored.label for claim in plan.claims if claim.stored} == {expected[gpu][goal]}
    fp8 = gpu != "a100-80gb" and goal != "memory"
    chosen = plan.loaded.recipe.kv_cache
    if goal == "memory":
        assert chosen is not None
        assert chosen.format == "turboquant_4bit_nc"
    else:
        assert (chosen is not None and chosen.format == "fp8") is fp8
    assert plan.loaded.recipe.serve is not None
    assert plan.loaded.recipe.serve.gpu == gpu


def test_sections_of_families(tmp_path: Path) -> None:
    """Prediction layers propose where there are some; latent attention has no section."""
    text = planned_text(make_starter("recipes/configs/deepseek-v3", gpu_named("h100"), "memory"))
    (tmp_path / "deepseek.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "deepseek.yaml")).recipe
    assert recipe.model.from_ == "dequantize"
    assert recipe.drafts is not None
    assert recipe.drafts.kind == "native"
    assert recipe.kv_cache is None
    assert "# Latent attention: nothing is made for its cache" in text
    assert recipe.evaluate is None
    assert "running the 1,369 GB source" in text
    llama, text = planned("recipes/configs/llama-3.3-70b", tmp_path)
    assert llama.loaded.recipe.drafts is None
    assert "#   kind: eagle3" in text


def test_a_cache_that_vllm_pads_back_is_not_chosen(tmp_path: Path) -> None:
    """Llama 4 has chunked layers in 16 bit, whose pages a smaller format would have to fill."""
    plan, text = planned("recipes/configs/llama-4-scout", tmp_path)
    assert plan.loaded.recipe.kv_cache is not None
    assert plan.loaded.recipe.kv_cache.format == "fp8"
    assert "Not turboquant_4bit_nc: vLLM 0.32 pads the pages" in text.replace("\n# ", " ")


def test_what_was_found_of_an_architecture() -> None:
    """Llama 4's NVFP4 experts have a warning, where they are chosen."""
    for gpu, warned in (("b200", True), ("h100", False)):
        text = starter_text(make_starter("recipes/configs/llama-4-scout", gpu_named(gpu), "memory"))
        assert ("computed another model from Llama 4's NVFP4 experts" in text.replace("\n# ", " ")) is warned


def test_shapes_that_do_not_fit_are_told(tmp_path: Path) -> None:
    """The comment names what was wanted and why it cannot be."""
    model = tiny_llama(tmp_path / "model", hidden=96, intermediate=96, heads=3, kv_heads=3)
    plan, text = planned(str(model), tmp_path)
    assert plan.loaded.recipe.weights.scheme.label == "W4A16 g32"
    assert "# int4 128 with gptq was not possible: in_features 96 is not a multiple of 128" in text


@pytest.mark.parametrize("preset", ["NVFP4A16", "FP8_BLOCK"])
def test_quantized_sources(preset: str, tmp_path: Path) -> None:
    """Are read as bfloat16, and that is said."""
    plain = tiny_llama(tmp_path / "plain", hidden=128, intermediate=256)
    compress_folder(plain, tmp_path / "packed", preset)
    plan, text = planned(str(tmp_path / "packed"), tmp_path)
    assert plan.loaded.recipe.model.from_ == "dequantize"
    assert "# Stored quantized (compressed-tensors)" in text


def test_sources_that_are_not_read(tmp_path: Path) -> None:
    """AWQ is refused as `compress plan` refuses it."""
    model = tiny_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="quantized with 'awq'"):
        make_starter(str(model), gpu_named("h100"), "memory")


def test_hostile_names(tmp_path: Path) -> None:
    """A folder's name that would end its comment or its line stays text."""
    model = tiny_llama(tmp_path / "a: b # ${HOME}\n'\"evil: yes")
    plan, text = planned(str(model), tmp_path)
    assert plan.loaded.recipe.model.source == str(model)
    assert not any(line.startswith("evil") for line in text.splitlines())


def test_broken_positions_are_told(tmp_path: Path) -> None:
    """Where the context would be scaled."""
    model = tiny_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2}
    (model / "config.json").write_text(json.dumps(config))
    assert "positions: factor is the integer 2" in starter_text(
        make_starter(str(model), gpu_named("h100"), "memory")
    )


def test_nothing_to_compress(tmp_path: Path) -> None:
    """A model without matrices in blocks."""
    model = tiny_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "proj" not in name}
    save_file(kept, model / "model.safetensors")
    with pytest.raises(UserError, match=r"nothing in .* can be stored in fewer bits"):
        make_starter(str(model), gpu_named("h100"), "memory")


@pytest.mark.parametrize(
    ("name", "found"),
    [("h100", "h100-80gb"), ("H200_141GB", "h200-141gb"), ("l4", "l4"), ("B200", "b200-180gb")],
)
def test_gpu_names(name: str, found: str) -> None:
    """By their beginnings, in either case; whole names before beginnings of others."""
    assert gpu_named(name).name == found


@pytest.mark.parametrize("name", ["", "h", "tpu"])
def test_unknown_gpus(name: str) -> None:
    """All are named."""
    with pytest.raises(UserError, match="h100-80gb"):
        gpu_named(name)
