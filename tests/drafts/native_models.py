"""Tiny models with prediction layers, and what prediction layers compute, slowly and one after another.

Legend: B sequences, T tokens, D hidden size, E experts, H heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import silu

from compressor.checkpoint.folder import FolderSource
from compressor.drafts.native_layer import PredictionLayer
from compressor.model.load import load_source_model
from tests.model.published import PUBLISHED

RUN = ("qwen3_next", "qwen3_next_fused", "qwen3_5", "qwen3_5_moe", "glm4_moe", "deepseek_v3")


def opened(name: str, folder: Path) -> tuple[FolderSource, Any, PredictionLayer]:
    """A family's tiny checkpoint, its model in fp32, and its prediction layer."""
    source = FolderSource(PUBLISHED[name](folder))
    target = load_source_model(source, torch.float32).requires_grad_(False)
    return source, target, PredictionLayer(source, target)


def hidden_of(target: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """What the target's head reads, [B, T, D]."""
    with torch.no_grad():
        found: torch.Tensor = target.get_decoder()(input_ids=ids_BT, use_cache=False)[0]
    return found


def whole_pass(
    layer: PredictionLayer, ids_T: torch.Tensor, hidden_TD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(state that the next step reads [D], logits [V]) of the last of T slots, nothing kept from before."""
    from transformers import DynamicCache

    count = len(ids_T)
    with torch.no_grad():
        recycled_1TD, normed_1TD = layer(
            ids_T[None],
            hidden_TD[None],
            torch.arange(count)[None],
            torch.ones(1, count, count, dtype=torch.bool).tril(),
            DynamicCache(),
        )
        return recycled_1TD[0, -1], layer.logits(normed_1TD)[0, -1]


def chain(
    layer: PredictionLayer, ids_T: torch.Tensor, hidden_TD: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    """Logits [V] of each step behind T - 1 true slots, every slot computed again for every step.

    ``ids_T``: the tokens, the last of which the target has not read; greedy from there on.
    """
    tokens, states, made = ids_T[1:], hidden_TD, []
    for _ in range(steps):
        recycled_D, logits_V = whole_pass(layer, tokens, states)
        made.append(logits_V)
        tokens = torch.cat([tokens, logits_V.argmax()[None]])
        states = torch.cat([states, recycled_D[None]])
    return made


def qwen3_next_by_hand(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    ids_T: torch.Tensor,
    hidden_TD: torch.Tensor,
) -> torch.Tensor:
    """``mtp.norm``'s output [T, D] from the stored tensors alone, token by token, expert by expert.

    Written from vLLM 0.32 ``qwen3_next_mtp.py`` and ``qwen3_next.py``.
    """

    def weight(name: str) -> torch.Tensor:
        return tensors[f"mtp.{name}.weight"].float()

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        x = x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
        return x * (1 + weight(name))

    def attended(x_TD: torch.Tensor) -> torch.Tensor:
        heads, width = config["num_attention_heads"], config["head_dim"]
        shared = heads // config["num_key_value_heads"]
        count = len(x_TD)
        mixed_THX = (x_TD @ weight("layers.0.self_attn.q_proj").T).view(count, heads, 2 * width)
        query_THW, gate_THW = mixed_THX.split(width, dim=-1)
        key = (x_TD @ weight("layers.0.self_attn.k_proj").T).view(count, -1, width)
        value = (x_TD @ weight("layers.0.self_attn.v_proj").T).view(count, -1, width)
        query_THW, key = (
            turned(normed(query_THW, "layers.0.self_attn.q_norm")),
            turned(normed(key, "layers.0.self_attn.k_norm")),
        )
        out_THW = torch.zeros(count, heads, width)
        for token in range(count):
            for head in range(heads):
                scores = key[: token + 1, head // shared] @ query_THW[token, head] / width**0.5
                out_THW[token, head] = scores.softmax(0) @ value[: token + 1, head // shared]
        gated = out_THW * gate_THW.sigmoid()
        return gated.flatten(1) @ weight("layers.0.self_attn.o_proj").T

    def turned(x_THW: torch.Tensor) -> torch.Tensor:
        rope = config["rope_parameters"]
        turning = int(config["head_dim"] * rope["partial_rotary_factor"])
        frequencies = rope["rope_theta"] ** (-torch.arange(0, turning, 2) / turning)
        angle_T1F = torch.outer(torch.arange(len(x_THW)).float(), frequencies)[:, None]
        first, second = x_THW[..., : turning // 2], x_THW[..., turning // 2 : turning]
        return torch.cat(
            [
                first * angle_T1F.cos() - second * angle_T1F.sin(),
                second * angle_T1F.cos() + first * angle_T1F.sin(),
                x_THW[..., turning:],
            ],
            dim=-1,
        )

    def mixture(x_TD: torch.Tensor) -> torch.Tensor:
        rows = []
        for x_D in x_TD:
            probs_E = (weight("layers.0.mlp.gate") @ x_D).softmax(0)
            best = probs_E.topk(config["num_experts_per_tok"])
            share = best.values / best.values.sum()
            out_D = torch.zeros_like(x_D)
            for expert, part in zip(best.indices.tolist(), share, strict=True):
                out_D += part * dense(x_D, f"layers.0.mlp.experts.{expert}")
            gate = (weight("layers.0.mlp.shared_expert_gate") @ x_D).sigmoid()
            rows.append(out_D + gate * dense(x_D, "layers.0.mlp.shared_expert"))
        return torch.stack(rows)

    def dense(x_D: torch.Tensor, name: str) -> torch.Tensor:
        inner = silu(weight(f"{name}.gate_proj") @ x_D) * (weight(f"{name}.up_proj") @ x_D)
        return weight(f"{name}.down_proj") @ inner

    embedded_TD = tensors["model.embed_tokens.weight"].float()[ids_T]
    both = [normed(embedded_TD, "pre_fc_norm_embedding"), normed(hidden_TD, "pre_fc_norm_hidden")]
    x_TD = torch.cat(both, dim=-1) @ weight("fc").T
    x_TD = x_TD + attended(normed(x_TD, "layers.0.input_layernorm"))
    x_TD = x_TD + mixture(normed(x_TD, "layers.0.post_attention_layernorm"))
    return normed(x_TD, "norm")
