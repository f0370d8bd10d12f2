"""Experts in one parameter: listening does not change a bit, and each expert hears its own inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, Llama4TextConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from compressor.model.routed import Share, heard_forward, is_expert_owner, phase_of

TOKENS, HIDDEN, EXPERTS, TOP_K = 19, 16, 6, 2


def _experts(kind: str) -> Any:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_attention_heads": 2}
    experts: nn.Module
    if kind == "gated":
        experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, num_experts=EXPERTS, moe_intermediate_size=8))
    elif kind == "transposed with biases":
        experts = GptOssExperts(GptOssConfig(**sizes, num_local_experts=EXPERTS, intermediate_size=8))
    else:
        config = NemotronHConfig(
            **sizes, n_routed_experts=EXPERTS, moe_intermediate_size=8, layers_block_type=["moe"]
        )
        experts = NemotronHExperts(config)
    numbers = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=numbers) * 0.3
    return experts


def _routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, two different experts for each token (never the last one), and their weights."""
    numbers = torch.Generator().manual_seed(2)
    scores = torch.rand(TOKENS, EXPERTS - 1, generator=numbers)
    weights, chosen = scores.topk(TOP_K)
    return torch.randn(TOKENS, HIDDEN, generator=numbers), chosen, weights


@pytest.mark.parametrize("kind", ["gated", "transposed with biases", "not gated"])
@torch.no_grad()
def test_decorated_experts(kind: str) -> None:
    """The same bits as transformers' grouped_mm, and its eager loop but for the order of summation."""
    experts = _experts(kind)
    hidden, chosen, weights = _routing()
    told: dict[str, list[Share]] = {}
    made = heard_forward(experts, lambda phase, rows: told.update({phase: list(rows)}), {})(
        hidden, chosen, weights
    )
    experts.config._experts_implementation = "grouped_mm"
    assert torch.equal(made, experts(hidden, chosen, weights))
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(made, experts(hidden, chosen, weights), rtol=1e-5, atol=1e-6)

    summed = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        x, tokens = told["up"][expert].x_MI, told["up"][expert].tokens_M
        inner, same = told["down"][expert].x_MI, told["down"][expert].tokens_M
        assert torch.equal(tokens, same)
        assert sorted(tokens.tolist()) == (chosen == expert).any(dim=1).nonzero().flatten().tolist()
        assert torch.equal(x, hidden[tokens])
        down = experts.down_proj[expert]
        out = inner @ (down if experts.is_transposed else down.T)
        out = out + experts.down_proj_bias[expert] if experts.has_bias else out
        share = (weights * (chosen == expert)).sum(dim=1)[tokens]
        summed.index_add_(0, tokens, out * share.unsqueeze(1))
    torch.testing.assert_close(summed, made, rtol=1e-5, atol=1e-6)
    assert len(told["up"][EXPERTS - 1].x_MI) == 0


@torch.no_grad()
def test_llama4_experts() -> None:
    """All experts see all tokens, those of others as zeros, which are not told."""
    config = Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=8, num_local_experts=3, num_attention_heads=2
    )
    experts: Any = Llama4TextExperts(config)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    owner = torch.arange(TOKENS) % 2  # the third expert gets nothing
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4))
    x_ENH = torch.stack([x * (owner == expert).unsqueeze(1) for expert in range(3)])
    told: dict[str, list[Share]] = {}
    forward = heard_forward(experts, lambda phase, rows: told.update({phase: list(rows)}), {})
    assert torch.equal(forward(x_ENH.view(-1, HIDDEN)), experts(x_ENH.view(-1, HIDDEN)))
    for expert in range(3):
        rows, tokens = told["up"][expert].x_MI, told["up"][expert].tokens_M
        assert torch.equal(tokens, (owner == expert).nonzero().flatten())
        assert torch.equal(rows, x[tokens])
        gate, up = (rows @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        torch.testing.assert_close(
            told["down"][expert].x_MI, up * nn.functional.silu(gate), rtol=1e-5, atol=1e-5
        )


ROUNDING = {"up": lambda x: (4 * x).round() / 4, "down": lambda x: (8 * x).round() / 8}


@torch.no_grad()
def test_inputs_are_rounded_after_they_were_heard() -> None:
    """Both phases, against a loop over experts; the listener is told the inputs before."""
    experts = _experts("gated")
    hidden, chosen, weights = _routing()
    told: dict[str, list[Share]] = {}
    made = heard_forward(experts, lambda phase, rows: told.update({phase: list(rows)}), ROUNDING)(
        hidden, chosen, weights
    )
    expected = torch.zeros_like(hidden)
    for token in range(TOKENS):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = (ROUNDING["up"](hidden[token]) @ experts.gate_up_proj[expert].T).chunk(2)
            inner = ROUNDING["down"](nn.functional.silu(gate) * up)
            expected[token] += weight * (inner @ experts.down_proj[expert].T)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    x, tokens = told["up"][0].x_MI, told["up"][0].tokens_M
    assert torch.equal(x, hidden[tokens])


@torch.no_grad()
def test_llama4_inputs_are_rounded() -> None:
    """The same of dense experts."""
    config = Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=8, num_local_experts=2, num_attention_heads=2
    )
    experts: Any = Llama4TextExperts(config)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    x_ENH = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4))
    made = heard_forward(experts, lambda *_: None, ROUNDING)(x_ENH.view(-1, HIDDEN)).view(2, TOKENS, HIDDEN)
    for expert in range(2):
        gate, up = (ROUNDING["up"](x_ENH[expert]) @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        inner = ROUNDING["down"](up * nn.functional.silu(gate))
        torch.testing.assert_close(made[expert], inner @ experts.down_proj[expert], rtol=1e-4, atol=1e-4)


class _Grouped(nn.Linear):
    """A linear layer that gives each half of its rows another half of the input, as DeepSeek-V4 has one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.unflatten(-1, (2, -1)))[..., 0]


def test_what_can_be_heard() -> None:
    """Plain linear layers by their weight, experts by both of theirs; nothing that computes otherwise."""
    assert phase_of(nn.Linear(2, 2), "weight") == ""
    assert phase_of(nn.Linear(2, 2), "bias") is None
    assert phase_of(_Grouped(2, 2), "weight") is None
    assert phase_of(nn.Conv1d(2, 2, 1), "weight") is None
    experts = _experts("gated")
    assert is_expert_owner(experts)
    assert [phase_of(experts, leaf) for leaf in ("gate_up_proj", "down_proj", "gate_up_proj_bias")] == [
        "up",
        "down",
        None,
    ]
