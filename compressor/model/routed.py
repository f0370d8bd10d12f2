"""Experts in one 3-D parameter, computed so that each expert's inputs can be heard.

While nobody listens, transformers' own forward runs. While somebody does, the experts' forward is replaced by
one that does the same arithmetic: for the classes that transformers decorates with
``use_experts_implementation`` that of its grouped_mm implementation (transformers 5.17
``integrations/moe.py`` grouped_mm_experts_forward), which its loader chooses by default; for Llama 4 that of
``modeling_llama4.py`` Llama4TextExperts.

Legend: N tokens, K experts a token, S = N * K, E experts, H hidden size, I intermediate size; M rows of one
expert, R rows that it could have been given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from compressor.model.stored_experts import StoredExperts, expert_weight, original

UP, DOWN = "up", "down"
# Subclasses of nn.Linear in transformers whose own forward does the same.
_PLAIN_LINEAR = frozenset({"FalconLinear"})
_LEAVES = {"gate_up_proj": UP, "up_proj": UP, "down_proj": DOWN}


# Rows before -> rows after, of any number of leading dimensions.
Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Share:
    """What one expert is given of a batch, and what it could have been given.

    Attributes:
        x_MI: the inputs of one product; the rows lie in the experts' own memory.
        tokens_M: the positions of their tokens in the flattened batch.
        batch_tokens: N.
        score_N: what the router chose by, of every token for this expert; None where that was not heard.
        offered: positions [R] -> the rows [R, H] that the expert would be given, had they been routed to it;
            None where that is not known. Of the first product only.
        inner: rows [R, H] -> the inputs [R, I] of the last product that the expert makes of them, with the
            weights and the rounding that it then has.
    """

    x_MI: torch.Tensor
    tokens_M: torch.Tensor
    batch_tokens: int
    score_N: torch.Tensor | None
    offered: Callable[[torch.Tensor], torch.Tensor] | None
    inner: Callable[[torch.Tensor], torch.Tensor]


# An expert, positions [R] -> the rows that it would be given: see ``Share.offered``.
_Offered = Callable[[int, torch.Tensor], torch.Tensor]
# Which experts each token goes to, bool [N, E] -> the scores [N, E] by which they were chosen, if heard.
Scores = Callable[[torch.Tensor], "torch.Tensor | None"]
# Told the inputs of a phase: each expert's share.
Listener = Callable[[str, Sequence[Share]], None]


class Choice(TorchFunctionMode):
    """Hears of what a router takes the largest: the scores that it chooses by, whatever it makes of them.

    Routers differ in what they compute and return; but for a few, which are not heard, all choose with
    ``topk``. Entered in the thread of the pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: torch.Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See ``TorchFunctionMode``: what is computed is what would be."""
        if func in (torch.topk, torch.Tensor.topk):
            self._last = args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))

    def take(self, chosen_NE: torch.Tensor) -> torch.Tensor | None:
        """The scores [N, E] by which these were chosen, once; None where what was last heard is not that."""
        last, self._last = self._last, None
        if last is None or last.numel() != chosen_NE.numel() or last.shape[-1] != chosen_NE.shape[1]:
            return None
        score_NE = last.detach().reshape(chosen_NE.shape)
        worst_N = score_NE.masked_fill(~chosen_NE, torch.inf).amin(dim=1)
        best_N = score_NE.masked_fill(chosen_NE, -torch.inf).amax(dim=1)
        return score_NE if bool((worst_N >= best_N).all()) else None


def _unheard(_: torch.Tensor) -> None:
    """No router is listened to."""


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
    experts: Any, listener: Listener, rounding: Mapping[str, Rounding], scores: Scores = _unheard
) -> Callable[..., torch.Tensor]:
    """A forward for the module ``experts`` that tells ``listener`` the inputs before it multiplies them.

    Experts that are stored are read one by one.

    ``rounding``: phase -> what is done to inputs that were heard, before they are multiplied. ``scores``: of
    this pass's router.
    """
    if _is_llama4(original(experts)):

        def dense(hidden: torch.Tensor) -> torch.Tensor:
            return _llama4(experts, listener, rounding, scores, hidden)

        return dense

    def grouped(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return _grouped(experts, listener, rounding, scores, hidden, top_k_index, top_k_weights)

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
    experts: Any,
    listener: Listener,
    rounding: Mapping[str, Rounding],
    scores: Scores,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Every expert sees every token; those not routed to it come as zeros."""
    made = original(experts)
    x_ENH = hidden.view(made.num_experts, -1, made.hidden_size)
    chosen_EN = (x_ENH != 0).any(dim=-1)
    tokens = [chosen_N.nonzero().flatten() for chosen_N in chosen_EN]
    score_NE = scores(chosen_EN.T)

    def gated(product: torch.Tensor) -> torch.Tensor:
        gate, up = product.chunk(2, dim=-1)
        inner: torch.Tensor = up * made.act_fn(gate)
        return inner

    def inner(expert: int, x_RH: torch.Tensor) -> torch.Tensor:
        return gated(_rounded(UP, x_RH, rounding) @ expert_weight(experts, "gate_up_proj", expert))

    def offered(expert: int, tokens_R: torch.Tensor) -> torch.Tensor:
        # A token comes times the sigmoid of its score for the expert that it was routed to.
        assert score_NE is not None
        score_RE = score_NE[tokens_R].float()
        best_R = score_RE.argmax(dim=1)
        was_R1 = score_RE.gather(1, best_R[:, None]).sigmoid()
        factor_R1 = score_RE[:, expert, None].sigmoid() / was_R1.clamp_min(torch.finfo(torch.float32).tiny)
        return (x_ENH[best_R, tokens_R] * factor_R1).to(x_ENH.dtype)

    def shares(x_ENI: torch.Tensor, offered: _Offered | None) -> list[Share]:
        rows = [x_NI[chosen] for x_NI, chosen in zip(x_ENI, tokens, strict=True)]
        return _shares(rows, tokens, x_ENI.shape[1], score_NE, offered, inner)

    listener(UP, shares(x_ENH, None if score_NE is None else offered))
    inner_ENI = _each(experts, "gate_up_proj", _rounded(UP, x_ENH, rounding), gated)
    listener(DOWN, shares(inner_ENI, None))
    inner_ENI = _rounded(DOWN, inner_ENI, rounding)
    return _each(experts, "down_proj", inner_ENI, lambda product: product).view(-1, made.hidden_size)


def _each(
    experts: Any, name: str, x_ENI: torch.Tensor, after: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``after`` of every expert's product; stored experts one by one, so that one product is held."""
    if not isinstance(experts, StoredExperts):
        return after(torch.bmm(x_ENI, getattr(experts, name)))
    made: torch.Tensor | None = None
    for expert, x_NI in enumerate(x_ENI):
        own = after(torch.bmm(x_NI[None], experts.weight(name, expert)[None]))
        if made is None:
            made = own.new_empty(len(x_ENI), *own.shape[1:])
        made[expert] = own[0]
    assert made is not None, "there are experts"
    return made


def _grouped(
    experts: Any,
    listener: Listener,
    rounding: Mapping[str, Rounding],
    scores: Scores,
    hidden_NH: torch.Tensor,
    top_k_index_NK: torch.Tensor,
    top_k_weights_NK: torch.Tensor,
) -> torch.Tensor:
    """Rows sorted by expert, one matrix product a group of rows."""
    tokens, top_k = top_k_index_NK.shape
    expert_S, order_S = torch.sort(top_k_index_NK.reshape(-1))
    token_S = order_S // top_k
    split = torch.bincount(expert_S, minlength=original(experts).num_experts).tolist()
    token_of = torch.split(token_S, split)
    chosen_NE = torch.zeros(tokens, len(split), dtype=torch.bool, device=hidden_NH.device)
    score_NE = scores(chosen_NE.scatter_(1, top_k_index_NK, True))

    def inner(expert: int, x_RH: torch.Tensor) -> torch.Tensor:
        return _grouped_inner(
            experts, rounding, x_RH, torch.full_like(expert_S[:1], expert).expand(len(x_RH))
        )

    def shares(x_SI: torch.Tensor, offered: _Offered | None) -> list[Share]:
        return _shares(torch.split(x_SI, split), token_of, tokens, score_NE, offered, inner)

    x_SH = hidden_NH[token_S]
    listener(UP, shares(x_SH, lambda _, tokens_R: hidden_NH[tokens_R]))
    inner_SI = _grouped_inner(experts, rounding, x_SH, expert_S)
    listener(DOWN, shares(inner_SI, None))
    inner_SI = _rounded(DOWN, inner_SI, rounding)
    made_SH = _product(experts, "down_proj", inner_SI, expert_S)
    weighted_SH = made_SH * top_k_weights_NK.reshape(-1)[order_S].unsqueeze(-1)
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    summed_NH = weighted_SH[back_S].view(tokens, top_k, hidden_NH.shape[-1]).sum(dim=1)
    return summed_NH.to(hidden_NH.dtype)


def _grouped_inner(
    experts: Any, rounding: Mapping[str, Rounding], x_SH: torch.Tensor, expert_S: torch.Tensor
) -> torch.Tensor:
    """The inputs [S, I] of the last product; rows sorted by expert."""
    x_SH = _rounded(UP, x_SH, rounding)
    module = original(experts)
    made: torch.Tensor
    if module.has_gate:
        made = module._apply_gate(_product(experts, "gate_up_proj", x_SH, expert_S))
    else:
        made = module.act_fn(_product(experts, "up_proj", x_SH, expert_S))
    return made


def _product(experts: Any, name: str, x_SI: torch.Tensor, expert_S: torch.Tensor) -> torch.Tensor:
    """Each row times its expert's matrix; rows sorted by expert."""
    module = original(experts)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    counts = torch.bincount(expert_S, minlength=module.num_experts)
    if not isinstance(experts, StoredExperts):
        return _multiplied(module, x_SI, getattr(module, name), counts, bias, expert_S)
    made = []
    rows = zip(torch.split(x_SI, counts.tolist()), torch.split(expert_S, counts.tolist()), strict=True)
    for expert, (x_MI, expert_M) in enumerate(rows):
        if len(x_MI):
            weight = experts.weight(name, expert)[None]
            made.append(_multiplied(module, x_MI, weight, counts[expert, None], bias, expert_M))
    return torch.cat(made)


def _multiplied(
    module: Any,
    x_SI: torch.Tensor,
    weight: torch.Tensor,
    counts_E: torch.Tensor,
    bias: torch.Tensor | None,
    expert_S: torch.Tensor,
) -> torch.Tensor:
    """Each row times its group's matrix: ``weight`` has one for each of ``counts_E``."""
    from transformers.integrations.moe import _grouped_linear

    made: torch.Tensor = _grouped_linear(
        x_SI,
        weight,
        torch.cumsum(counts_E, dim=0, dtype=torch.int32),
        bias=None if bias is None else bias[expert_S],
        is_transposed=module.is_transposed,
    )
    return made


def _shares(
    rows: Sequence[torch.Tensor],
    tokens: Sequence[torch.Tensor],
    batch_tokens: int,
    score_NE: torch.Tensor | None,
    offered: _Offered | None,
    inner: Callable[[int, torch.Tensor], torch.Tensor],
) -> list[Share]:
    """Every expert's share of a batch."""
    return [
        Share(
            x_MI,
            tokens_M,
            batch_tokens,
            None if score_NE is None else score_NE[:, expert],
            None if offered is None else partial(offered, expert),
            partial(inner, expert),
        )
        for expert, (x_MI, tokens_M) in enumerate(zip(rows, tokens, strict=True))
    ]


def _rounded(phase: str, x: torch.Tensor, rounding: Mapping[str, Rounding]) -> torch.Tensor:
    return rounding[phase](x) if phase in rounding else x
