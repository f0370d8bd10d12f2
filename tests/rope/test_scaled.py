"""What is written into a config.json: read back by transformers, family by family, and by rule."""

from __future__ import annotations

import copy
import importlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from compressor.model.reach import reach
from compressor.rope import methods
from compressor.rope.positions import read_positions, text_part
from compressor.rope.refusals import Engine, family_refusal, method_refusal
from compressor.rope.scaled import scaled_config
from compressor.rope.spec import ContextSpec, Method

FP32 = 2e-6  # tests/rope/test_methods.py
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 8192,
    "rope_theta": 1e5,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "an_unknown_field": {"kept": [1, 2]},
}
_SMALL = {key: LLAMA[key] for key in LLAMA if key.endswith(("_size", "_heads", "_layers", "_embeddings"))}
# One of each way to say it: legacy and new, partial, nested, per kind of layer, latent, three axes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-without-theta": {key: LLAMA[key] for key in LLAMA if key != "rope_theta"},
    "qwen3": _SMALL | {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1_000_000},
    "mixtral": _SMALL | {"model_type": "mixtral", "rope_theta": 1e6},
    "jetmoe": _SMALL | {"model_type": "jetmoe", "kv_channels": 128, "rope_theta": 1e4},
    "zamba2": _SMALL
    | {
        "model_type": "zamba2",
        "attention_head_dim": 128,
        "layers_block_type": ["linear_attention", "hybrid"],
        "rope_theta": 1e4,
    },
    "smollm3": _SMALL | {"model_type": "smollm3", "rope_theta": 2e6, "no_rope_layers": [1, 0]},
    "phi": _SMALL | {"model_type": "phi", "partial_rotary_factor": 0.4375, "rope_theta": 1e4},
    "gpt_neox": _SMALL | {"model_type": "gpt_neox", "rotary_emb_base": 20000, "rotary_pct": 0.5},
    "stablelm": _SMALL | {"model_type": "stablelm", "rope_theta": 10000},
    "qwen3_next": _SMALL
    | {"model_type": "qwen3_next", "head_dim": 256, "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": _SMALL
        | {
            "model_type": "qwen3_5_text",
            "head_dim": 256,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
        },
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "text_config": _SMALL
        | {
            "model_type": "qwen2_5_vl_text",
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        },
    },
    "gemma3-legacy": _SMALL
    | {
        "model_type": "gemma3_text",
        "head_dim": 64,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 512,
    },
    "gemma3-nested": {
        "model_type": "gemma3",
        "text_config": _SMALL
        | {
            "model_type": "gemma3_text",
            "head_dim": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    },
    "olmo3": _SMALL
    | {
        "model_type": "olmo3",
        "rope_theta": 500000,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": _SMALL
    | {
        "model_type": "deepseek_v3",
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "rope_theta": 1e4,
    },
    "phi3": _SMALL | {"model_type": "phi3", "rope_theta": 1e4, "original_max_position_embeddings": 8192},
    "phimoe": _SMALL | {"model_type": "phimoe", "rope_theta": 1e4},
    "falcon": _SMALL | {"model_type": "falcon", "rope_theta": 1e4, "alibi": False},
    "granite": _SMALL | {"model_type": "granite", "rope_theta": 1e4},
}
ALL: tuple[Method, ...] = ("linear", "ntk", "yarn", "longrope", "llama3")


def spec_of(config: dict[str, Any], method: Method, target: int = 20000, **asked: Any) -> ContextSpec:
    """Of a method; LongRoPE's factors are YaRN's, stretched, so that no two are equal."""
    positions = read_positions(config)
    if method == "longrope" and "factors" not in asked:
        yarn = methods.yarn(positions.rotary_dim, positions.theta, 2.5, 8192).divisors(positions.theta)
        asked["factors"] = tuple(1 + (by - 1) * 1.1 + i / 1000 for i, by in enumerate(yarn))
    return ContextSpec(method, target, **asked)


def _expected(config: dict[str, Any], spec: ContextSpec, factor: float) -> methods.Frequencies:
    """Straight from the formulas."""
    positions = read_positions(config)
    dims, theta = positions.rotary_dim, positions.theta
    if spec.method == "linear":
        return methods.linear(dims, theta, factor)
    if spec.method == "ntk":
        return methods.ntk(dims, theta, factor)
    if spec.method == "llama3":
        return methods.llama3(dims, theta, factor, 8192)
    if spec.method == "yarn":
        latent = 1.0 if positions.latent else None
        return methods.yarn(dims, theta, factor, 8192, mscale=latent, mscale_all_dim=latent)
    assert spec.factors is not None
    return methods.longrope(theta, spec.factors, methods.longrope_multiplier(factor, 8192))


def _rotary(folder: Path, config: dict[str, Any]) -> Any:
    """transformers' own module of rotary positions, of a config as a folder has it."""
    (folder / "config.json").write_text(json.dumps(config))
    text = AutoConfig.from_pretrained(folder).get_text_config()
    name = text.model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    classes = [key for key in vars(module) if key.endswith("RotaryEmbedding") and "Vision" not in key]
    assert len(classes) == 1, classes
    return getattr(module, classes[0])(text), text


def _usable() -> list[tuple[str, Method]]:
    return [
        (name, method)
        for name, config in FAMILIES.items()
        for method in ALL
        if not method_refusal(read_positions(config), method, ("transformers", "vllm"))
    ]


@pytest.mark.parametrize(("name", "method"), _usable())
def test_transformers_reads_it(
    name: str,
    method: Method,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The frequencies and multipliers that were meant, from config.json alone, and nothing to warn of."""
    config = FAMILIES[name]
    spec = spec_of(config, method)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    result = scaled_config(config, spec)
    rotary, text = _rotary(tmp_path, result.config)
    if method != "longrope":  # short_mscale and long_mscale are vLLM's and phimoe's
        assert not caplog.records
    layered = read_positions(config).kind
    prefix = f"{layered}_" if layered else ""
    inverse = getattr(rotary, f"{prefix}inv_freq")
    multiplier = getattr(rotary, f"{prefix}attention_scaling")
    if method == "longrope":
        x, places = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[20000 - 1]])
        rotary(x, places)
        inverse = rotary.inv_freq
    expected = _expected(config, spec, 20000 / 8192)
    torch.testing.assert_close(
        torch.tensor(expected.inverse, dtype=torch.float64), inverse.double(), rtol=FP32, atol=0
    )
    if name != "phimoe":  # it has no attention_scaling, but reads long_mscale when it runs
        assert float(multiplier) == pytest.approx(expected.multiplier, rel=1e-12)
    else:
        assert text.rope_parameters.get("long_mscale", 1.0) == pytest.approx(expected.multiplier)
    if layered:
        theta = 5e5 if name == "olmo3" else 1e4
        local = methods.unscaled(read_positions(config).rotary_dim, theta).inverse
        found = rotary.sliding_attention_inv_freq.double()
        torch.testing.assert_close(torch.tensor(local, dtype=torch.float64), found, rtol=FP32, atol=0)
    limit = {"linear": 8192}.get(method, 20000)
    assert text.max_position_embeddings == (20000 if "gemma3" in name else limit)
    assert reach(text_part(result.config)[1]) == reach(text.to_dict()) == 20000 == result.length


@pytest.mark.parametrize(("name", "method"), _usable())
def test_nothing_else_changes(name: str, method: Method) -> None:
    """The source's config is left alone; every field but those of the positions is kept."""
    config = FAMILIES[name]
    before = copy.deepcopy(config)
    result: dict[str, Any] = scaled_config(config, spec_of(config, method)).config
    assert config == before
    json.dumps(result)
    changed = {"rope_parameters", "max_position_embeddings", "original_max_position_embeddings"}
    changed |= {"rope_theta", "rope_scaling", "rotary_emb_base", "rope_local_base_freq"}
    changed |= {"head_dim"} if name == "mixtral" and method in ("yarn", "longrope") else set()
    nested = "text_config" in before
    text: dict[str, Any] = result["text_config"] if nested else result
    assert not {"rope_theta", "rope_scaling", "rotary_emb_base", "rope_local_base_freq"} & text.keys()
    if nested:
        assert {**before, "text_config": 0} == {**result, "text_config": 0}
    source: dict[str, Any] = before["text_config"] if nested else before
    assert {key: source[key] for key in source if key not in changed} == {
        key: text[key] for key in text if key not in changed
    }


def test_every_family_refuses_something_or_nothing() -> None:
    """Which methods each can have: the table of docs/context.md."""
    usable = _usable()
    found = {name: [method for family, method in usable if family == name] for name in FAMILIES}
    assert found["llama"] == found["gpt_neox"] == list(ALL)
    assert found["gemma3-nested"] == found["olmo3"] == ["linear", "ntk", "yarn", "llama3"]
    assert found["phi3"] == found["phimoe"] == ["ntk", "longrope"]
    assert found["qwen2_5_vl"] == ["ntk"]
    assert found["deepseek_v3"] == found["qwen3_5"] == ["ntk", "yarn"]
    assert not any(family_refusal(read_positions(config)) for config in FAMILIES.values())


@pytest.mark.parametrize(("original", "target"), [(8192, 20000), (8192, 131072), (3000, 10000), (4099, 9973)])
def test_smallest_factor(original: int, target: int) -> None:
    """Exactly the quotient, as transformers recomputes it; the product that vLLM rounds down reaches, too."""
    config = LLAMA | {"max_position_embeddings": original}
    yarn = scaled_config(config, ContextSpec("yarn", target))
    assert yarn.factor == target / original == yarn.config["rope_parameters"]["factor"]  # type: ignore[index]
    assert yarn.length == yarn.config["max_position_embeddings"] == target
    linear = scaled_config(config, ContextSpec("linear", target))
    assert int(original * linear.factor) == linear.length == target
    assert linear.factor == pytest.approx(target / original, rel=1e-15)


def test_a_given_factor() -> None:
    """Reaches what it reaches: the config says so, and a person is told."""
    more = scaled_config(LLAMA, ContextSpec("yarn", 16384, factor=4.0))
    assert (more.factor, more.length, more.config["max_position_embeddings"]) == (4.0, 32768, 32768)
    assert any("32768 tokens, more than target_length 16384" in note for note in more.notes)
    cut = scaled_config(LLAMA, ContextSpec("yarn", 10000, factor=1.3))
    assert (cut.length, cut.factor) == (10649, 10649 / 8192)
    whole = scaled_config(LLAMA, ContextSpec("ntk", 16384, factor=2))
    assert isinstance(whole.factor, float)
    less = scaled_config(LLAMA, ContextSpec("llama3", 131072, factor=8.0))
    assert (less.factor, less.length) == (8.0, 131072)
    assert any("needs training" in note for note in less.notes)


def test_original_length_below_the_config() -> None:
    """Qwen3: 40960 positions, of which 32768 are the training's."""
    config = LLAMA | {"max_position_embeddings": 40960}
    result = scaled_config(config, ContextSpec("yarn", 131072, original_length=32768))
    parameters: Any = result.config["rope_parameters"]
    assert (parameters["factor"], parameters["original_max_position_embeddings"]) == (4.0, 32768)
    linear = scaled_config(config, ContextSpec("linear", 131072, original_length=32768))
    assert (linear.config["max_position_embeddings"], linear.length) == (32768, 131072)
    lower = scaled_config(config, ContextSpec("yarn", 36864, original_length=32768))
    assert any("says that it reads 40960" in note for note in lower.notes)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_attention_of_latent_models(family: str) -> None:
    """Is scaled as in vLLM 0.32 (models/deepseek_v2.py): by YaRN's multiplier twice, and all of a head."""
    source = FAMILIES["deepseek_v3"] | {"model_type": family}
    config: Any = AutoConfig.for_model(**scaled_config(source, ContextSpec("yarn", 32768)).config)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = "DeepseekV2Attention" if family == "deepseek_v2" else "DeepseekV3Attention"
    with torch.device("meta"):
        attention = getattr(module, name)(config, 0)
    assert attention.scaling == pytest.approx((64 + 128) ** -0.5 * methods.yarn_multiplier(4.0) ** 2)


def test_windows_are_told() -> None:
    """They do not grow; where layers share their positions, all are scaled."""
    windowed = LLAMA | {"model_type": "mistral", "sliding_window": 4096}
    assert (
        "window of 4096 tokens attend no further"
        in scaled_config(windowed, ContextSpec("yarn", 16384)).notes[-1]
    )
    unused = windowed | {"model_type": "qwen2", "use_sliding_window": False}
    assert len(scaled_config(unused, ContextSpec("yarn", 16384)).notes) == 1
    gemma = scaled_config(FAMILIES["gemma3-legacy"], ContextSpec("yarn", 16384))
    assert gemma.notes[-1] == "layers with a sliding window keep their frequencies"


def test_longrope_fields() -> None:
    """Equal short and long factors where no engine switches; both multipliers of both engines."""
    spec = spec_of(LLAMA, "longrope", 32768)
    parameters: Any = scaled_config(LLAMA, spec).config["rope_parameters"]
    assert parameters["short_factor"] == parameters["long_factor"] == list(spec.factors or ())
    multiplier = methods.longrope_multiplier(4.0, 8192)
    assert parameters["factor"] == 4.0
    for key in ("attention_factor", "short_mscale", "long_mscale"):
        assert parameters[key] == multiplier, key
    phi = FAMILIES["phi3"]
    switching: Any = scaled_config(phi, spec_of(phi, "longrope", 32768))
    assert switching.config["rope_parameters"]["short_factor"] == [1.0] * 32
    assert switching.config["original_max_position_embeddings"] == 8192
    assert any("--max-model-len" in note for note in switching.notes)
    whole = scaled_config(LLAMA, ContextSpec("longrope", 32768, factors=(2,) * 32)).config
    assert all(type(by) is float for by in whole["rope_parameters"]["long_factor"])  # type: ignore[index]


def test_a_scaling_made_longer() -> None:
    """Of a model that says where it started: the same method, its knobs kept, the factor from there."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "beta_fast": 64, "truncate": False}
    source = LLAMA | {
        "max_position_embeddings": 32768,
        "rope_parameters": yarn | {"original_max_position_embeddings": 8192},
    }
    result = scaled_config(source, ContextSpec("yarn", 65536))
    parameters: Any = result.config["rope_parameters"]
    assert (parameters["factor"], parameters["original_max_position_embeddings"]) == (8.0, 8192)
    assert (parameters["beta_fast"], parameters["truncate"]) == (64.0, False)
    assert "already" in result.notes[0]


def test_dynamic_is_for_transformers_alone() -> None:
    """Refused where vLLM is to read it; else the config's length stays, from which it grows."""
    alone: tuple[Engine, ...] = ("transformers",)
    result = scaled_config(LLAMA, ContextSpec("dynamic", 32768), engines=alone)
    assert result.config["rope_parameters"] == {"rope_type": "dynamic", "rope_theta": 1e5, "factor": 4.0}
    assert (result.config["max_position_embeddings"], result.length) == (8192, 32768)
    assert any("vLLM" in note for note in result.notes)
