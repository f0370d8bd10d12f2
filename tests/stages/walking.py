"""Tiny models and their claims for tests of the walk, and the walk done again in a slow, obvious way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.checkpoint.folder import FolderSource
from compressor.dialects import DIALECTS
from compressor.model.families import family_for
from compressor.numerics.input_ranges import RangeSums
from compressor.planner.claims import claim_tensors
from compressor.recipe.model import WeightsSection
from compressor.schemes.base import Scheme
from compressor.solvers.statistics import MomentSums
from compressor.stages.base import Claim
from compressor.stages.importance import norm_importance
from compressor.stages.walk import WalkSpec

SPEC = WalkSpec(
    batch_tokens=64,
    dtype="float32",
    states="host",
    moment_bytes=1 << 30,
    keep_inputs=True,
)
# The matrices of a Llama block that read one input, in the order in which they compute.
STEPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def claims_of(source: FolderSource, weights: dict[str, object]) -> list[Claim]:
    """The claims of a recipe's ``weights`` section."""
    section = WeightsSection.model_validate(weights)
    family = family_for(source.config)
    return claim_tensors(source.headers, source.config, family, section, DIALECTS["compressed-tensors"])


def some_tokens(rows: int, length: int) -> torch.Tensor:
    """int64 [rows, length]: random bytes."""
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def whole_model_walk(
    folder: Path, source: FolderSource, claims: Sequence[Claim], batches: Sequence[torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Module -> stored tensors of every quantized matrix of a Llama folder.

    Two whole models in memory, a full forward pass of both for every step of every block, and hooks.
    """
    exact, fed = _load(folder), _load(folder)
    by_module = {claim.role.parts[0].module: claim for claim in claims if claim.scheme is not None}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for index in range(exact.config.num_hidden_layers):
        for leaves in STEPS:
            names = [f"model.layers.{index}.{leaf}" for leaf in leaves]
            heard = [name for name in names if name in by_module]
            if not heard:
                continue
            claims_here = [by_module[name] for name in heard]
            scheme = claims_here[0].scheme
            assert scheme is not None
            width = exact.get_submodule(heard[0]).in_features
            inputs = [_input(exact, heard[0], ids) for ids in batches]
            measured = _input_tensors(scheme, inputs)
            weight_OI = torch.cat([exact.get_submodule(name).weight for name in heard])
            sums = MomentSums(width, "cpu", with_change=True, weight_OI=weight_OI)
            for ids, x_NI in zip(batches, inputs, strict=True):
                fed_NI = _input(fed, heard[0], ids)
                sums.add(scheme.round_inputs(fed_NI, measured) if scheme.rounds_inputs else fed_NI, x_NI)
            found |= _solve(source, exact, fed, claims_here, sums, measured)
    return found


def _input_tensors(scheme: Scheme, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    if not scheme.static_inputs:
        return {}
    ranges = RangeSums(inputs[0].shape[1], "cpu")
    for x_NI in inputs:
        ranges.add(x_NI)
    return scheme.input_tensors(ranges.result())


def _rounding(scheme: Scheme, tensors: dict[str, torch.Tensor]) -> Callable[[nn.Module, Any], Any]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (scheme.round_inputs(args[0].flatten(0, -2), tensors).view(args[0].shape),)

    return hook


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _input(model: PreTrainedModel, name: str, ids: torch.Tensor) -> torch.Tensor:
    heard = []

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        heard.append(args[0].flatten(0, -2).clone())

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    model(ids, use_cache=False)
    handle.remove()
    return heard[0]


def _solve(
    source: FolderSource,
    exact: PreTrainedModel,
    fed: PreTrainedModel,
    claims: list[Claim],
    sums: MomentSums,
    measured: dict[str, torch.Tensor],
) -> dict[str, dict[str, torch.Tensor]]:
    """Solves one step, fuse group by fuse group, and puts the decoded weights into ``fed``."""
    groups: dict[str, list[Claim]] = {}
    for claim in claims:
        part = claim.role.parts[0]
        shared = part.fuse_group if claim.scheme and claim.scheme.shares_tensor_scale else None
        groups.setdefault(shared or part.module, []).append(claim)
    found = {}
    for group in groups.values():
        scheme, solver = group[0].scheme, group[0].solver
        assert scheme is not None
        assert solver is not None
        modules = [claim.role.parts[0].module for claim in group]
        weights = [exact.get_submodule(module).weight.float() for module in modules]
        importance = norm_importance(source, group[0].role.input_norm, weights[0].shape[1])
        if solver.needs_calibration:
            solved = solver.solve_heard(weights, scheme, sums.result(), importance)
        else:
            solved = solver.solve(weights, scheme, importance)
        for module, result, weight in zip(modules, solved, weights, strict=True):
            found[module] = result.tensors | measured
            fed.get_submodule(module).weight.copy_(scheme.decode(result.tensors, *weight.shape))
            if scheme.rounds_inputs:
                fed.get_submodule(module).register_forward_pre_hook(_rounding(scheme, measured))
    return found
