"""Formats against models: known sizes, layers that stay in 16 bit, what cannot be, and vLLM's flags."""

from __future__ import annotations

import pytest

from compressor.kv.formats import FORMATS
from compressor.planner.kv_bytes import kv_bytes, kv_layers
from compressor.planner.kv_choice import (
    KvOption,
    cache_bytes,
    format_map,
    kv_options,
    launch_flags,
)

GIB = 2**30
LONG = 131_072
LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": LONG,
}
NESTED_SCOUT = {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}


def options(config, **how) -> dict[str, KvOption]:
    """By name."""
    found, reason = kv_options(config, **how)
    assert reason == ""
    return {option.format: option for option in found}


def gib(option: KvOption) -> float:
    """Of one sequence of the longest context."""
    return round(max(size.bytes for size in option.sizes if size.users == 1) / GIB, 2)


def test_70b_at_128k():
    """40 GiB, and what each format makes of it; forced ends count in 16 bit."""
    found = options(LLAMA_70B)
    expected = {
        "bf16": 40.0,
        "fp8": 20.0,
        "int4_per_token_head": 10.62,
        "turboquant_k8v4": 16.55,
        "turboquant_4bit_nc": 11.95,
        "turboquant_k3v4_nc": 10.76,
        "turboquant_3bit_nc": 9.57,
        "turboquant_2.5bit": 6.25,
        "turboquant_3.5bit": 8.75,
    }
    assert {name: gib(found[name]) for name in expected} == expected
    assert found["turboquant_4bit_nc"].kept == (0, 1, 78, 79)
    assert found["turboquant_4bit_nc"].bytes_per_token == 8 * (76 * 134 + 4 * 512)
    assert found["turboquant_2.5bit"].kept == ()


def test_points_are_contexts_and_users():
    """The longest context with every number of users; users each have blocks of their own."""
    found = options(LLAMA_70B, contexts=(1000, 4096), users=(1, 8), chosen="fp8")
    sizes = found["fp8"].sizes
    assert [(size.context, size.users) for size in sizes] == [(1000, 1), (4096, 1), (4096, 8)]
    assert sizes[0].bytes == 1008 * 163_840
    assert sizes[2].bytes == 8 * sizes[1].bytes
    assert [name for name, option in found.items() if option.chosen] == ["fp8"]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_next", "jamba", "gemma3n_text"])
def test_layers_add_up_to_the_parts(model_type):
    """A second count, layer by layer, of the same 16-bit cache."""
    config = {"model_type": model_type}
    layers, _ = kv_layers(config)
    known, _ = kv_bytes(config, 5000)
    assert cache_bytes(layers, {}, 5000, engine=False) == known.total_bytes


def test_hybrids_have_no_forced_ends():
    """Qwen3-Next: all twelve attention layers, at 262 bytes a token and head."""
    found = options({"model_type": "qwen3_next"})["turboquant_4bit_nc"]
    assert (found.layers, found.kept) == (12, ())
    assert found.bytes_per_token == 12 * 2 * 262


def test_shared_layers_count_as_ends_too():
    """Gemma 3n: vLLM skips by index, and the last ones have no cache: only the first two are kept."""
    layers, _ = kv_layers({"model_type": "gemma3n_text"})
    quantized = format_map(layers, {"model_type": "gemma3n_text"}, FORMATS["turboquant_4bit_nc"])
    assert sorted(quantized) == [4, 9, 14, 19]


@pytest.mark.parametrize(
    ("config", "form", "reason"),
    [
        ({"model_type": "deepseek_v3"}, "turboquant_4bit_nc", "latent attention (MLA)"),
        ({**LLAMA_70B, "head_dim": 96}, "turboquant_4bit_nc", "power of two"),
        ({"model_type": "gpt_oss"}, "turboquant_4bit_nc", "no common page size"),
        ({"model_type": "mistral"}, "fp8", "no layer has full attention"),
    ],
)
def test_what_cannot_be_has_a_reason_and_no_size(config, form, reason):
    """And 16 bit stays possible."""
    found = options(config)
    assert reason in found[form].problem
    assert found[form].sizes == ()
    assert found["bf16"].problem == ""


def test_latent_attention_in_8_bit():
    """One byte an element: half of 70,272."""
    assert options({"model_type": "deepseek_v3"})["fp8"].bytes_per_token == 35_136


def test_unknown_caches_have_a_reason():
    """DeepSeek-V4 by name."""
    assert "DeepSeek-V4" in kv_options({"model_type": "deepseek_v4"})[1]
    assert "not known" in kv_options({"model_type": "mamba9"})[1]


def test_flags_name_what_vllm_does_not_skip_itself():
    """Ends are unasked; windows go by name, chunks by index."""
    config = {**LLAMA_70B, "num_hidden_layers": 20}
    layers, _ = kv_layers(config)
    whole = format_map(layers, config, FORMATS["turboquant_4bit_nc"])
    assert launch_flags(layers, config, whole) == "--kv-cache-dtype turboquant_4bit_nc"
    fewer = {index: form for index, form in whole.items() if index not in (3, 17)}
    assert launch_flags(layers, config, fewer).endswith("4bit_nc --kv-cache-dtype-skip-layers 3 17")
    assert launch_flags(layers, config, {}) == ""
    gemma, _ = kv_layers({"model_type": "gemma3_text"})
    flags = launch_flags(
        gemma, {"model_type": "gemma3_text"}, format_map(gemma, {"model_type": "gemma3_text"}, FORMATS["fp8"])
    )
    assert flags == "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers sliding_window"
    scout, _ = kv_layers(NESTED_SCOUT)
    flags = launch_flags(scout, NESTED_SCOUT, format_map(scout, NESTED_SCOUT, FORMATS["fp8"]))
    assert " 0 1 2 4 5 6 8 " in flags
