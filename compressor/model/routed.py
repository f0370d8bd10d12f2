"""Experts in one 3-D parameter, computed so that each expert's inputs can be heard.

While nobody listens, transformers' own forward runs. While somebody does, the experts' forward is replaced by
one that does the same arithmetic: for the classes that transformers decorates with
``use_experts_implementation`` that of its grouped_mm implementation (transformers 5.17
``integrations/moe.py`` grouped_mm_experts_forward), which its loader chooses by default; for Llama 4 that of
``modeling_llama4.py`` Llama4TextExperts.

Legend: N tokens, K experts a token, S = N * K, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

UP, DOWN = "up", "down"
# Subclasses of nn.Linear in transformers whose own forward does the same.
_PLAIN_LINEAR = frozenset({"FalconLinear"})
_LEAVES = {"gate_up_proj": UP, "up_proj": UP, "down_proj": DOWN}


# Rows before -> rows after, of any number of leading dimensions.
Rounding = Callable[[torch.Tensor], torch.Tensor]
# Told the inputs of a phase: for each expert its rows x [N, width] and the positions [N] of their tokens.
Listener = Callable[[str, Sequence[tuple[torch.Tensor, torch.Tensor]]], None]


def is_expert_owner(module: nn.Module) -> bool:
    """Whether the module's forward can be replaced by ``heard_forward``."""
    return _is_grouped(module) or _is_llama4(module)


def phase_of(module: nn.Module, leaf: str) -> str | None:
    """Which product of a module a parameter belongs to: "" of a linear layer, "up", "down", or None."""
    # A subclass with a forward of its own may give each group of rows another part of its input.
    if type(module).forward is nn.Linear.forward or type(module).__name__ in _PLAIN_LINEAR:
        return "" if leaf == "weight" else None
    return _LEAVES.get(leaf) if is_expert_owner(module) else None


def heard_forward(
    experts: Any, listener: Listener, rounding: Mapping[str, Rounding]
) -> Callable[..., torch.Tensor]:
    """A forward for the module ``experts`` that tells ``listener`` the inputs before it multiplies them.

    ``rounding``: phase -> what is done to inputs that were heard, before they are multiplied.
    """
    if _is_llama4(experts):

        def dense(hidden: torch.Tensor) -> torch.Tensor:
            return _llama4(experts, listener, rounding, hidden)

        return dense

    def grouped(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return _grouped(experts, listener, rounding, hidden, top_k_index, top_k_weights)

    return grouped


def round_inputs(block: nn.Module, roundings: Mapping[tuple[str, str], Rounding]) -> None:
    """From now on layers of a block multiply rounded inputs: (module, phase) -> what is done to them."""
    experts: dict[str, dict[str, Rounding]] = {}
    for (owner, phase), rounding in roundings.items():
        if phase:
            experts.setdefault(owner, {})[phase] = rounding
        else:
            block.get_submodule(owner).register_forward_pre_hook(_before(rounding))
    for owner, phases in experts.items():
        module = block.get_submodule(owner)
        module.forward = heard_forward(module, lambda _phase, _rows: None, phases)


def _before(rounding: Rounding) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _, args: (rounding(args[0]), *args[1:])


def _is_grouped(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def _is_llama4(module: nn.Module) -> bool:
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    return isinstance(module, Llama4TextExperts)


def _llama4(
    experts: Any, listener: Listener, rounding: Mapping[str, Rounding], hidden: torch.Tensor
) -> torch.Tensor:
    """Every expert sees every token; those not routed to it come as zeros."""
    x_ENH = hidden.view(experts.gate_up_proj.shape[0], -1, experts.hidden_size)
    tokens = [rows.nonzero().flatten() for rows in (x_ENH != 0).any(dim=-1)]
    listener(UP, [(x_NH[chosen], chosen) for x_NH, chosen in zip(x_ENH, tokens, strict=True)])
    x_ENH = _rounded(UP, x_ENH, rounding)
    gate, up = torch.bmm(x_ENH, experts.gate_up_proj).chunk(2, dim=-1)
    inner_ENI = up * experts.act_fn(gate)
    listener(DOWN, [(x_NI[chosen], chosen) for x_NI, chosen in zip(inner_ENI, tokens, strict=True)])
    inner_ENI = _rounded(DOWN, inner_ENI, rounding)
    return torch.bmm(inner_ENI, experts.down_proj).view(-1, experts.hidden_size)


def _grouped(
    experts: Any,
    listener: Listener,
    rounding: Mapping[str, Rounding],
    hidden_NH: torch.Tensor,
    top_k_index_NK: torch.Tensor,
    top_k_weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Rows sorted by expert, one matrix product a group of rows."""
    from transformers.integrations.moe import _grouped_linear

    tokens, top_k = top_k_index_NK.shape
    expert_S, order_S = torch.sort(top_k_index_NK.reshape(-1))
    counts = torch.bincount(expert_S, minlength=experts.num_experts)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    token_S = order_S // top_k
    split = counts.tolist()
    token_of = torch.split(token_S, split)

    def product(x_S: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(experts, f"{name}_bias")[expert_S] if experts.has_bias else None
        weight = getattr(experts, name)
        made: torch.Tensor = _grouped_linear(
            x_S, weight, ends, bias=bias, is_transposed=experts.is_transposed
        )
        return made

    x_SH = hidden_NH[token_S]
    listener(UP, list(zip(torch.split(x_SH, split), token_of, strict=True)))
    x_SH = _rounded(UP, x_SH, rounding)
    if experts.has_gate:
        inner_SI = experts._apply_gate(product(x_SH, "gate_up_proj"))
    else:
        inner_SI = experts.act_fn(product(x_SH, "up_proj"))
    listener(DOWN, list(zip(torch.split(inner_SI, split), token_of, strict=True)))
    inner_SI = _rounded(DOWN, inner_SI, rounding)
    weighted_SH = product(inner_SI, "down_proj") * top_k_weights_NK.reshape(-1)[order_S].unsqueeze(-1)
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    summed_NH = weighted_SH[back_S].view(tokens, top_k, hidden_NH.shape[-1]).sum(dim=1)
    return summed_NH.to(hidden_NH.dtype)


def _rounded(phase: str, x: torch.Tensor, rounding: Mapping[str, Rounding]) -> torch.Tensor:
    return rounding[phase](x) if phase in rounding else x
