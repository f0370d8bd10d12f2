"""The recipe's ``kv_cache`` section against models: budgets, faults, labels and flags."""

from __future__ import annotations

from typing import Any

import pytest

from compressor.errors import UserError
from compressor.planner.kv_planned import KvPlanned, plan_kv
from compressor.recipe.kv_cache import KvCacheSection

LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def planned(section: dict[str, Any], config: dict[str, Any] = LLAMA_70B):
    """The plan, the faults and the warnings of a section."""
    faults: list[UserError] = []
    warnings: list[str] = []
    return plan_kv(KvCacheSection.model_validate(section), config, faults, warnings), faults, warnings


def sound(section: dict[str, Any], config: dict[str, Any] = LLAMA_70B) -> KvPlanned:
    """The plan of a section without faults."""
    found, faults, _ = planned(section, config)
    assert found is not None, faults
    return found


def test_auto_knows_what_vllm_cannot_page() -> None:
    """As a format that is named is refused; other tiers have no pages."""
    config = {"model_type": "gpt_oss"}
    assert "turboquant_4bit_nc" in sound({"budget": {"bits": 8}}, config).spec.unpaged
    assert sound({"budget": {"bits": 8}, "tier": "own"}, config).spec.unpaged == ()
    assert sound({"budget": {"bits": 8}}).spec.unpaged == ()


@pytest.mark.parametrize(
    ("budget", "bytes_per_token"),
    [
        ({"bytes_per_token": 100_000}, 100_000),
        ({"bits": 4.5}, 92_160),
        ({"gib": 12, "context": 131_072}, 98_304),
        ({"gib": 96, "context": 131_072, "users": 8}, 98_304),
    ],
)
def test_budgets_are_bytes_of_a_token(budget, bytes_per_token):
    """327,680 bytes a token are 16 bits; a GiB over 128K tokens is 8 KiB a token."""
    assert sound({"budget": budget}).spec.budget_bytes_per_token == bytes_per_token


def test_states_and_windows_come_out_of_a_budget_in_gib():
    """Scout: 36 layers of 8,192 tokens at 4,096 bytes are 1.125 GiB."""
    scout = {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}
    found = sound({"budget": {"gib": 3.125, "context": 131_072}}, scout)
    assert found.spec.budget_bytes_per_token == 2 * 2**30 // 131_072


@pytest.mark.parametrize(
    ("section", "config", "where", "message"),
    [
        ({"format": "turboquant_4bit_nc"}, {**LLAMA_70B, "head_dim": 96}, "format", "power of two"),
        ({"format": "turboquant_4bit_nc"}, {"model_type": "deepseek_v3"}, "format", "latent attention"),
        ({"format": "fp8"}, {"model_type": "mamba9"}, "", "not known"),
        ({"format": "fp8"}, {"model_type": "deepseek_v4"}, "", "DeepSeek-V4"),
        ({"format": "turboquant_4bit_nc"}, {"model_type": "gpt_oss"}, "format", "cannot page"),
        ({"budget": {"bits": 2}}, LLAMA_70B, "budget.bits", "turboquant_3bit_nc, 78,400 bytes"),
        (
            {"budget": {"bytes_per_token": 9}, "tier": "own"},
            LLAMA_70B,
            "budget.bytes_per_token",
            "turboquant_mse_1bit, 23,040 bytes",
        ),
        (
            {"budget": {"bits": 0.05}, "tier": "research"},
            LLAMA_70B,
            "budget.bits",
            "a fitted codec, 1,280 bytes",
        ),
        ({"format": "turboquant_2.5bit", "tier": "vllm"}, LLAMA_70B, "format", "not servable by vLLM 0.32"),
        ({"budget": {"bits": 4}, "calibrate": False}, LLAMA_70B, "calibrate", "calibrate is false"),
        ({"format": "fitted_3.5bit", "calibrate": False}, LLAMA_70B, "calibrate", "is fitted to"),
        ({"budget": {"bits": 4}}, {"model_type": "deepseek_v3"}, "format", "no formats to choose among"),
    ],
)
def test_faults(section, config, where, message):
    """One each, at its key."""
    found, faults, _ = planned(section, config)
    assert found is None
    (fault,) = faults
    assert fault.where == ("kv_cache." + where).rstrip(".")
    assert message in fault.what


def test_flags_and_labels():
    """What vLLM serves has flags; the rest is labelled."""
    assert sound({"format": "turboquant_4bit_nc"}).flags == "--kv-cache-dtype turboquant_4bit_nc"
    assert sound({"format": "bf16"}).flags == ""
    found, _, warnings = planned({"format": "turboquant_2.5bit"})
    assert found is not None
    assert (found.flags, found.servable, found.spec.tier) == ("", False, "own")
    assert "not servable by vLLM 0.32" in warnings[0]
    assert "not servable by vLLM 0.32" in found.described()
    _, _, warnings = planned({"budget": {"bits": 16}})
    assert "holds it in 16 bit" in warnings[0]


def test_what_is_fitted():
    """A named format with codecs is stored as it is; one without, and auto, are fitted by the stage."""
    assert sound({"format": "fitted_3.5bit"}).spec.fits
    assert sound({"budget": {"bits": 8}}).spec.fits
    assert not sound({"format": "turboquant_3.5bit"}).spec.fits


def test_what_needs_data():
    """Fits do; latent attention, 16 bit and ``calibrate: false`` have none."""
    assert sound({"format": "fp8"}).needs_data
    assert not sound({"format": "fp8", "calibrate": False}).needs_data
    assert not sound({"format": "bf16"}).needs_data
    assert not sound({"format": "fp8"}, {"model_type": "deepseek_v3"}).needs_data


def test_a_gib_budget_beside_windows_is_warned_of() -> None:
    """vLLM's pages are not the stored bytes there; in dense models they are."""
    section = {"budget": {"gib": 40, "context": 8192}}
    assert any(
        "pages of the largest size" in warning
        for warning in planned(section, {"model_type": "gemma3_text"})[2]
    )
    assert not any("pages" in warning for warning in planned(section)[2])
    assert not any("pages" in w for w in planned(section | {"tier": "own"}, {"model_type": "gemma3_text"})[2])
