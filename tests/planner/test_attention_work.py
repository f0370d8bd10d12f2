"""Operations of attention: masks counted pair by pair, and what PyTorch counts of models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from compressor.data import shipped_root
from compressor.planner.attention_work import (
    AttentionLayer,
    attention_layers,
    full_layers,
    prompt_flops,
    written_flops,
)
from compressor.planner.kv_choice import cache_bytes

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}


def published(name: str) -> dict[str, Any]:
    """The config of a shipped header set."""
    found: dict[str, Any] = json.loads(
        (shipped_root() / "recipes/configs" / name / "config.json").read_text()
    )
    return found


def sees(kind: str, window: int | None, query: int, key: int) -> bool:
    """Whether a mask lets a query at a place see a key at another."""
    if key > query:
        return False
    if kind == "sliding":
        assert window is not None
        return query - key < window
    if kind == "chunked":
        assert window is not None
        return query // window == key // window
    return True


@pytest.mark.parametrize("kind", ["full", "sliding", "chunked"])
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 13, 40])
def test_pairs_of_masks(kind: str, tokens: int) -> None:
    """As many as a mask has places, one by one."""
    window = None if kind == "full" else 5
    layer = AttentionLayer(kind, 1, 1, window=window)
    places = [(query, key) for query in range(tokens) for key in range(tokens)]
    assert layer.pairs(tokens) == sum(sees(kind, window, *place) for place in places)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("qwen3", {}),
        (
            "deepseek_v3",
            {
                "q_lora_rank": 16,
                "kv_lora_rank": 12,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 8,
                "v_head_dim": 12,
                "head_dim": 4,
                "first_k_dense_replace": 3,
                "num_key_value_heads": 4,
            },
        ),
    ],
)
def test_attention_of_a_prompt_is_what_pytorch_counts(kind: str, more: dict[str, Any]) -> None:
    """Its counter sees whole squares, without the mask: as many pairs as tokens times tokens."""
    config = AutoConfig.for_model(kind, **TINY | more)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = 12
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    rotary = 2 * (config.qk_rope_head_dim if kind == "deepseek_v3" else 8) // 2 * tokens
    layers, reason = attention_layers(config.to_dict())
    assert not reason
    assert counted - rotary == sum(layer.prompt_pair_flops for layer in layers) * tokens**2


def test_a_written_token_is_what_pytorch_counts() -> None:
    """One query over the cache and itself."""
    config = AutoConfig.for_model("llama", **TINY)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.long), past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    counted = counter.get_flop_counts()["Global"]
    layers, _ = attention_layers(config.to_dict())
    # The products of rotary frequencies and one place are counted, too.
    assert counted[torch.ops.aten.bmm] - 2 * 4 == written_flops(layers, 21)
    products = sum(
        p.numel() for name, p in model.named_parameters() if "norm" not in name and "embed" not in name
    )
    assert counted[torch.ops.aten.mm] == 2 * products


def test_the_twin_of_scout_by_hand() -> None:
    """36 of 48 layers read chunks of 8,192; the twin reads all, with as many heads."""
    config = published("llama-4-scout")
    work, _ = attention_layers(config)
    twin, cached = full_layers(config)
    tokens = 131_072
    pair = 4 * 40 * 128
    assert written_flops(work, tokens) == pair * (12 * tokens + 36 * 8192)
    assert written_flops(twin, tokens) == pair * 48 * tokens
    assert prompt_flops(twin, 3) == pair * 48 * 6
    assert cache_bytes(cached, {}, tokens, engine=False) == 48 * 2 * 8 * 128 * 2 * tokens


def test_states_of_qwen3_next_do_not_grow() -> None:
    """36 layers of the gated delta rule compute the same behind any number of tokens."""
    config = published("qwen3-next-80b-a3b")
    work, _ = attention_layers(config)
    growth = written_flops(work, 2_000) - written_flops(work, 1_000)
    assert growth == 12 * 4 * 16 * 256 * 1_000
    state = 36 * (7 * 32 * 128 * 128 + 2 * 4 * (2 * 16 * 128 + 32 * 128))
    assert written_flops(work, 0) == state
    twin, cached = full_layers(config)
    assert written_flops(twin, 1_000) == 48 * 4 * 16 * 256 * 1_000
    assert {layer.kind for layer in cached} == {"full"}


def test_a_model_that_sees_everything_is_its_own_twin() -> None:
    """Full and latent attention stay."""
    for name in ("llama-3.3-70b", "deepseek-v3"):
        config = published(name)
        work, _ = attention_layers(config)
        assert full_layers(config)[0] == work


def test_an_unknown_model_has_a_reason() -> None:
    """None is guessed."""
    layers, reason = attention_layers({"model_type": "nobody-knows"})
    assert layers == ()
    assert "not known" in reason
