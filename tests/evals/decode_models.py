"""Tiny random models that decode, and a slow way to decode with them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.model.zoo import FAMILIES

_BLOCKS = 4


def small(words: int = 12, *, seed: int = 0, layers: int = 2, spread: float = 0.6) -> PreTrainedModel:
    """A random Llama of few words in float32."""
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, spread)
    return model


def family(name: str, folder: Path) -> PreTrainedModel:
    """One of the zoo in float32, with blocks that outweigh the embedding: its text does not repeat."""
    model = AutoModelForCausalLM.from_pretrained(FAMILIES[name](folder), dtype=torch.float32).eval()
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):
            parameter.data.zero_()
        elif parameter.dim() > 1 and "layer" in path:
            parameter.data.mul_(_BLOCKS)
    return model


def prompts(count: int, tokens: int, words: int) -> list[torch.Tensor]:
    """Random ids, other ones in each."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(words, (tokens,), generator=generator) for _ in range(count)]


@torch.no_grad()
def slowly(model: PreTrainedModel, ids_T: torch.Tensor, new_tokens: int) -> tuple[int, ...]:
    """The greedy continuation, one pass over all of it for each token."""
    made: list[int] = []
    while len(made) < new_tokens:
        whole_1T = torch.cat([ids_T, torch.tensor(made, dtype=torch.long)])[None]
        made.append(int(model(whole_1T, use_cache=False).logits[0, -1].argmax()))
    return tuple(made)
