"""Families with experts, on checkpoints named as published: what is taken, what stays and why, what fuses."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from compressor.checkpoint.folder import FolderSource
from compressor.errors import CheckpointError
from compressor.model.families import family_for
from compressor.model.names import extract, insert
from compressor.spec import Role, TensorHeader

from .published import PUBLISHED, fused

Open = Callable[[str], FolderSource]

DRAFT = "multi-token prediction layer"
TOWER = "tower or projector of another modality"
# Whose prediction layer is one more block.
BEHIND_THE_LAST = ("glm4_moe", "deepseek_v3")
ATTENTION = {f"self_attn.{kind}_proj" for kind in "qkvo"}
EXPERTS = {f"mlp.experts.N.{kind}_proj" for kind in ("gate", "up", "down")}
LINEAR_ATTENTION = {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"}
DENSE = {f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}


def shared(name: str) -> set[str]:
    """A shared expert's matrices."""
    return {f"mlp.{name}.{kind}_proj" for kind in ("gate", "up", "down")}


# The matrices that are quantized, by their modules in a block, and words of why other matrices stay.
TAKEN: dict[str, set[str]] = {
    "mixtral": ATTENTION | {f"block_sparse_moe.experts.N.w{index}" for index in (1, 2, 3)},
    "qwen3_moe": ATTENTION | EXPERTS,
    "qwen3_next": ATTENTION
    | EXPERTS
    | shared("shared_expert")
    | {"linear_attn.in_proj_qkvz", "linear_attn.out_proj"},
    "qwen3_5": ATTENTION | DENSE | LINEAR_ATTENTION,
    "qwen3_5_moe": ATTENTION | EXPERTS | shared("shared_expert") | LINEAR_ATTENTION,
    "glm4_moe": ATTENTION | EXPERTS | DENSE | shared("shared_experts"),
    "deepseek_v3": EXPERTS
    | DENSE
    | shared("shared_experts")
    | {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")},
    "jamba": ATTENTION
    | {f"feed_forward.{kind}_proj" for kind in ("gate", "up", "down")}
    | {f"feed_forward.experts.N.{kind}_proj" for kind in ("gate", "up", "down")},
}
TAKEN["qwen3_next_fused"] = TAKEN["qwen3_next"]
_NEXT = {"mlp.gate": "router", "mlp.shared_expert_gate": "one row", "linear_attn.conv1d": "convolution"}
KEPT: dict[str, dict[str, str]] = {
    "mixtral": {"block_sparse_moe.gate": "router"},
    "qwen3_moe": {"mlp.gate": "router"},
    "qwen3_next": {**_NEXT, "linear_attn.in_proj_ba": "decay"},
    "qwen3_next_fused": {**_NEXT, "linear_attn.in_proj_ba": "decay"},
    "qwen3_5": {
        "linear_attn.conv1d": "convolution",
        "linear_attn.in_proj_a": "decay",
        "linear_attn.in_proj_b": "decay",
    },
    "qwen3_5_moe": {**_NEXT, "linear_attn.in_proj_a": "decay", "linear_attn.in_proj_b": "decay"},
    "glm4_moe": {"mlp.gate": "router"},
    "deepseek_v3": {"mlp.gate": "router", "self_attn.kv_b_proj": "fold it"},
    "jamba": {
        "feed_forward.router": "router",
        **{f"mamba.{name}": "Mamba mixer" for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")},
        "mamba.A_log": "Mamba mixer",
    },
}


def roles_of(source: FolderSource) -> dict[str, Role]:
    """The role of each tensor."""
    family = family_for(source.config)
    return {name: family.role(header, source.config) for name, header in source.headers.items()}


def inside(name: str) -> str:
    """What is behind the block's number, other numbers as N."""
    behind = re.sub(r"^.*?\.layers\.\d+\.", "", name.removesuffix(".weight"))
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", behind)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_matrix_is_taken_or_stays_for_a_reason(name: str, family: Open) -> None:
    """All experts are taken; vectors, prediction layers and towers never; nothing is inferred."""
    source = family(f"published {name}")
    assert family_for(source.config).inferred == ""
    roles = roles_of(source)
    quantized = {tensor for tensor, role in roles.items() if role.kind == "linear" and not role.reason}
    assert {inside(part.module) for tensor in quantized for part in roles[tensor].parts} == TAKEN[name]
    told = {}
    for tensor, role in roles.items():
        assert bool(role.reason) == (tensor not in quantized), tensor
        is_draft = tensor.startswith("mtp.") or (name in BEHIND_THE_LAST and ".layers.2." in tensor)
        assert (role.reason == DRAFT) == is_draft, tensor
        assert (role.reason == TOWER) == (".visual." in tensor), tensor
        if is_draft or role.reason == TOWER:
            continue
        if len(source.headers[tensor].shape) > 1 and role.kind in ("linear", "other"):
            told[inside(tensor)] = role.reason
            assert ".experts." not in tensor or tensor in quantized
    assert any(role.reason == DRAFT for role in roles.values()) == (
        name not in ("mixtral", "qwen3_moe", "jamba")
    )
    for module, word in KEPT[name].items():
        assert word in told.pop(module), module
    assert not any(told.values())


def test_fused_and_separate_experts_are_the_same_matrices(family: Open) -> None:
    """Part for part, with the same names, scale groups and norms; put together they are the tensor again."""
    alone, together = family("published qwen3_next"), family("published qwen3_next_fused")
    found = {}
    for source in (alone, together):
        for tensor, role in roles_of(source).items():
            values = source.read(tensor)
            for part in role.parts:
                found.setdefault(part.module, []).append(
                    (extract(values, part), part.fuse_group, role.input_norm, role.reason)
                )
            if len(source.headers[tensor].shape) == 3 and role.kind == "linear":
                again = insert([(part, extract(values, part)) for part in role.parts], tuple(values.shape))
                assert torch.equal(again, values)
    for module, ((one, *facts), (other, *others)) in found.items():
        assert torch.equal(one, other), module
        assert facts == others, module


def test_what_vllm_fuses_shares_a_scale(family: Open) -> None:
    """Gate and up of every expert and shared expert, the latents' inputs, linear attention's (qwen3_5.py)."""
    groups: dict[str, set[str]] = {}
    for name in ("mixtral", "glm4_moe", "deepseek_v3", "qwen3_5", "qwen3_5_moe", "jamba"):
        for role in roles_of(family(f"published {name}")).values():
            for part in role.parts if role.kind == "linear" else ():
                if part.fuse_group is not None:
                    groups.setdefault(f"{name} {inside(part.fuse_group)}", set()).add(inside(part.module))

    def both(parent: str) -> set[str]:
        return {f"{parent}gate_proj", f"{parent}up_proj"}

    qkv = {f"self_attn.{kind}_proj" for kind in "qkv"}
    linear = {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z"}
    assert groups == {
        "mixtral self_attn.qkv_proj": qkv,
        "mixtral block_sparse_moe.experts.N.w13": {
            "block_sparse_moe.experts.N.w1",
            "block_sparse_moe.experts.N.w3",
        },
        "glm4_moe self_attn.qkv_proj": qkv,
        "glm4_moe mlp.gate_up_proj": both("mlp."),
        "glm4_moe mlp.experts.N.gate_up_proj": both("mlp.experts.N."),
        "glm4_moe mlp.shared_experts.gate_up_proj": both("mlp.shared_experts."),
        "deepseek_v3 self_attn.fused_qkv_a_proj": {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"},
        "deepseek_v3 mlp.gate_up_proj": both("mlp."),
        "deepseek_v3 mlp.experts.N.gate_up_proj": both("mlp.experts.N."),
        "deepseek_v3 mlp.shared_experts.gate_up_proj": both("mlp.shared_experts."),
        "qwen3_5 self_attn.qkv_proj": qkv,
        "qwen3_5 mlp.gate_up_proj": both("mlp."),
        "qwen3_5 linear_attn.in_proj_qkvz": linear,
        "qwen3_5_moe self_attn.qkv_proj": qkv,
        "qwen3_5_moe mlp.experts.N.gate_up_proj": both("mlp.experts.N."),
        "qwen3_5_moe mlp.shared_expert.gate_up_proj": both("mlp.shared_expert."),
        "qwen3_5_moe linear_attn.in_proj_qkvz": linear,
        "jamba self_attn.qkv_proj": qkv,
        "jamba feed_forward.gate_up_proj": both("feed_forward."),
        "jamba feed_forward.experts.N.gate_up_proj": both("feed_forward.experts.N."),
    }


def test_fused_mixtral_is_refused() -> None:
    """Under the names of transformers' modules, which no engine loads."""
    config = {"model_type": "mixtral", "num_hidden_layers": 2}
    header = TensorHeader("model.layers.0.mlp.experts.gate_up_proj", "BF16", (4, 64, 32))
    with pytest.raises(CheckpointError, match="names that engines do not load"):
        family_for(config).role(header, config)


@pytest.mark.parametrize("shape, why", [((4, 63, 32), "63 rows do not split"), ((0, 64, 32), "no model has")])
def test_experts_that_do_not_split(shape: tuple[int, ...], why: str) -> None:
    """One fault, with the tensor's name."""
    header = TensorHeader("model.layers.0.mlp.experts.gate_up_proj", "BF16", shape)
    with pytest.raises(CheckpointError, match=why) as caught:
        family_for({"model_type": "qwen3_moe"}).role(header, {})
    assert caught.value.where == header.name


def test_the_models_of_these_tests_are_what_they_say(family: Open) -> None:
    """``fused`` stacks gate over up: transformers computes the same with either, as test_tensor_map shows."""
    source = family("published qwen3_moe")
    tensors = {name: source.read(name) for name in source.headers}
    experts = "model.layers.1.mlp.experts"
    stacked = fused(tensors)[f"{experts}.gate_up_proj"]
    assert torch.equal(stacked[3, :32], tensors[f"{experts}.3.gate_proj.weight"])
    assert torch.equal(stacked[3, 32:], tensors[f"{experts}.3.up_proj.weight"])
