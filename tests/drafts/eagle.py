"""What tests of the EAGLE-3 head share: a tiny target, a head, and the head computed slowly.

Legend: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel

from compressor.drafts.base import LAST
from compressor.drafts.eagle3 import Eagle3Head, SharedEnds
from compressor.drafts.eagle3_shape import shape_for
from compressor.drafts.eagle3_warm import warm_start
from compressor.drafts.unroll import Unroll
from compressor.drafts.vocabulary import count_tokens, frequent_tokens
from tests.tiny import tiny_llama, tiny_model, tokens_of_bytes

LAYERS = 5


@dataclass(frozen=True)
class Target:
    """A tiny model in fp32.

    Attributes:
        folder: where it lies.
        config: its config.json.
        model: loaded.
    """

    folder: Path
    config: dict[str, Any]
    model: PreTrainedModel

    @property
    def ends(self) -> SharedEnds:
        """What a head shares with it."""
        return SharedEnds.of(self.model)

    def hidden(self, ids_BT: torch.Tensor, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        """Hidden states by layer, and ``LAST``."""
        with torch.no_grad():
            found = self.model(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
        return {n: found[n] for n in layers} | {LAST: found[-1]}

    def written(self, count: int, prompt: int, new: int, seed: int) -> torch.Tensor:
        """Random prompts and what it says to them, [count, prompt + new]."""
        generator = torch.Generator().manual_seed(seed)
        prompts_BT = torch.randint(1, 250, (count, prompt), generator=generator)
        made = self.model.generate(
            prompts_BT, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert isinstance(made, torch.Tensor)
        return made


def make_target(folder: Path, *, tie: bool = True, rope: Mapping[str, Any] | None = None) -> Target:
    """Writes a tiny Llama, with other ``rope_parameters`` where some are given, and loads it."""
    tiny_llama(folder, layers=LAYERS, hidden=64, heads=2, kv_heads=1, dtype=torch.float32, tie=tie, seed=3)
    config = json.loads((folder / "config.json").read_text())
    if rope:
        config["rope_parameters"] = dict(rope)
        (folder / "config.json").write_text(json.dumps(config))
    return Target(folder, config, AutoModelForCausalLM.from_pretrained(folder).eval())


def make_llama4(folder: Path, **more: Any) -> Target:
    """Writes a tiny Llama 4 of two layers and loads it."""
    config = Llama4TextConfig(
        **tokens_of_bytes(),
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=96,
        intermediate_size_mlp=128,
        num_local_experts=2,
        attention_chunk_size=512,
        **more,
    )
    tiny_model(folder, Llama4ForCausalLM, config, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Target(folder, model.config.to_dict(), model)


def make_head(target: Target, *, known: int | None = None, before: bool = True, seed: int = 0) -> Eagle3Head:
    """A head whose norms differ from one; it knows ``known`` tokens where that is given."""
    shape = shape_for(target.config, draft_vocabulary=known, norm_before_residual=before)
    vocabulary = None
    if known is not None:
        vocabulary = frequent_tokens(count_tokens(target.written(8, 4, 60, seed), 256), known)
    head = Eagle3Head(shape, target.ends, vocabulary, seed=seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in head.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (0.1 if parameter.dim() > 1 else 0.3)
    return head


def trained_head(target: Target, *, known: int | None, steps: int) -> Eagle3Head:
    """A head that has seen a few texts of the target, three steps ahead."""
    head = make_head(target, known=known)
    warm_start(head, target.model)
    ids_BT = target.written(96, 12, 52, seed=1)
    hidden = target.hidden(ids_BT, head.shape.layers)
    unroll = Unroll(head, 3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(0, len(ids_BT), (8,), generator=generator)
        losses = unroll(ids_BT[rows], {n: states[rows] for n, states in hidden.items()})
        optimizer.zero_grad()
        losses.loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimizer.step()
    return head.eval()


def slow_outputs(head: Eagle3Head, ids: list[int], states_TD: torch.Tensor) -> torch.Tensor:
    """What a head puts out for a text of slots, [T, D]: no cache, one head of attention at a time.

    Args:
        head: unscaled positions.
        ids: of each slot.
        states_TD: its hidden state: ``fc``'s, or the head's own.
    """
    shape, get = head.shape, head.get_parameter
    dims, layer = shape.head_dim, "layers.0."

    def norm(rows_TD: torch.Tensor, name: str) -> torch.Tensor:
        return rows_TD / (rows_TD.square().mean(-1, keepdim=True) + shape.eps).sqrt() * get(name)

    def turned(rows_TE: torch.Tensor) -> torch.Tensor:
        speeds = shape.rope["rope_theta"] ** (-torch.arange(0, dims, 2) / dims)
        angles = torch.arange(len(rows_TE))[:, None] * speeds
        first, second = rows_TE[:, : dims // 2], rows_TE[:, dims // 2 :]
        parts = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
        return torch.cat(parts, dim=1)

    embedded_TD = norm(head._ends.embedding_VD[ids], f"{layer}input_layernorm.weight")
    normed_TD = norm(states_TD, f"{layer}hidden_norm.weight")
    both = torch.cat([embedded_TD, normed_TD], dim=1)
    query, key, value = (both @ get(f"{layer}self_attn.{name}_proj.weight").T for name in "qkv")
    found = []
    for number in range(shape.heads):
        mine = slice(number * dims, (number + 1) * dims)
        shared = number // (shape.heads // shape.kv_heads)
        theirs = slice(shared * dims, (shared + 1) * dims)
        scores = turned(query[:, mine]) @ turned(key[:, theirs]).T / dims**0.5
        ahead = torch.ones_like(scores).triu(1).bool()
        found.append(scores.masked_fill(ahead, float("-inf")).softmax(-1) @ value[:, theirs])
    out = torch.cat(found, dim=1) @ get(f"{layer}self_attn.o_proj.weight").T
    out = out + (normed_TD if shape.norm_before_residual else states_TD)
    inner = norm(out, f"{layer}post_attention_layernorm.weight")
    gate, up = (inner @ get(f"{layer}mlp.{name}_proj.weight").T for name in ("gate", "up"))
    return out + (torch.nn.functional.silu(gate) * up) @ get(f"{layer}mlp.down_proj.weight").T


def slow_logits(head: Eagle3Head, out_D: torch.Tensor) -> torch.Tensor:
    """fp32 [R] of one row of ``slow_outputs``."""
    normed = out_D / (out_D.square().mean() + head.shape.eps).sqrt() * head.get_parameter("norm.weight")
    return head.output_RD @ normed
