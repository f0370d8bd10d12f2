"""Exchanged rotary modules against models that are built from the same config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from compressor.checkpoint.reconfigured import ReconfiguredSource
from compressor.checkpoint.sources import open_source
from compressor.errors import CheckpointError
from compressor.model.load import load_source_model
from compressor.model.rotary import positions_of, rotary_modules
from compressor.rope.positions import read_positions
from compressor.rope.scaled import scaled_config
from compressor.rope.spec import ContextSpec, Method
from tests.model.zoo import FAMILIES as ZOO
from tests.tiny import tiny_model, tokens_of_bytes

LENGTH = 64
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    **tokens_of_bytes(),
    "max_position_embeddings": LENGTH,
}
GEMMA = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
PHI = {"original_max_position_embeddings": LENGTH}
FAMILIES: list[tuple[str, Any, Any, Method]] = [
    ("llama-yarn", LlamaForCausalLM, LlamaConfig(**SIZES), "yarn"),
    ("llama-ntk", LlamaForCausalLM, LlamaConfig(**SIZES), "ntk"),
    ("llama-longrope", LlamaForCausalLM, LlamaConfig(**SIZES), "longrope"),
    ("partial", StableLmForCausalLM, StableLmConfig(**SIZES, partial_rotary_factor=0.5), "longrope"),
    ("by-layer", Gemma3ForCausalLM, Gemma3TextConfig(**SIZES | GEMMA), "yarn"),
    ("short-and-long", Phi3ForCausalLM, Phi3Config(**SIZES, **PHI), "longrope"),
]


@pytest.mark.parametrize(
    ("cls", "config", "method"), [one[1:] for one in FAMILIES], ids=[f[0] for f in FAMILIES]
)
def test_exchanged_positions_are_those_of_a_model_built_so(
    tmp_path: Path, cls: Any, config: Any, method: Method
) -> None:
    """Past the original length and within it, to the bit; afterwards the model is what it was."""
    source = open_source(str(tiny_model(tmp_path / "model", cls, config, torch.float32)))
    spec = ContextSpec(method, 4 * LENGTH)
    if method == "longrope":
        pairs = read_positions(source.config).rotary_dim // 2
        factors = tuple(1 + 0.4 * index for index in range(pairs))
        spec = ContextSpec(method, 4 * LENGTH, factors=factors, attention_factor=1.23)
    scaled = scaled_config(source.config, spec)
    fresh = load_source_model(ReconfiguredSource(source, scaled.config, scaled.length), torch.float32)
    model = load_source_model(source, torch.float32)
    assert not model.training
    texts = [torch.arange(length)[None] % 250 for length in (3 * LENGTH, LENGTH // 2)]
    with torch.inference_mode():
        before = [model(ids_1T, use_cache=False).logits for ids_1T in texts]
        with positions_of(model, scaled.config, "model"):
            within = [model(ids_1T, use_cache=False).logits for ids_1T in texts]
        after = [model(ids_1T, use_cache=False).logits for ids_1T in texts]
        built = [fresh(ids_1T, use_cache=False).logits for ids_1T in texts]
    for one, other in zip(within, built, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(before[0], within[0])


def test_a_fault_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """Whatever is raised within."""
    source = open_source(str(tiny_model(tmp_path, LlamaForCausalLM, LlamaConfig(**SIZES), torch.float32)))
    model = load_source_model(source, torch.float32)
    (_, _, old), *more = rotary_modules(model)
    assert not more
    scaled = scaled_config(source.config, ContextSpec("yarn", 4 * LENGTH))

    def fail() -> None:
        assert rotary_modules(model)[0][2] is not old
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), positions_of(model, scaled.config, "model"):
        fail()
    assert rotary_modules(model)[0][2] is old


def test_a_model_without_rotary_modules_is_refused() -> None:
    """Learned positions have no factors."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=16, n_positions=16))
    with (
        pytest.raises(CheckpointError, match="no rotary module"),
        positions_of(model, model.config.to_dict(), "gpt2"),
    ):
        pass


def test_latent_attention_is_scaled_elsewhere_too(tmp_path: Path) -> None:
    """DeepSeek's softmax: exchanged modules alone would be another model."""
    source = open_source(str(ZOO["deepseek_v3"](tmp_path / "model")))
    model = load_source_model(source, torch.float32)
    yarn = scaled_config(source.config, ContextSpec("yarn", 1024)).config
    with pytest.raises(CheckpointError, match="latent attention"), positions_of(model, yarn, "it"):
        pass
    with positions_of(model, scaled_config(source.config, ContextSpec("ntk", 1024)).config, "it"):
        pass
