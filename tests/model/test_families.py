"""Families against checkpoints that transformers saves: each tensor has a role, parts are the weights."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from compressor.errors import UserError
from compressor.model import families as registry
from compressor.model.families import BUILTINS, embedding_problem, family_for, text_config, tied
from compressor.model.families.base import Family
from compressor.model.families.generic import GenericFamily
from compressor.model.families.llama import LlamaFamily
from compressor.model.names import extract, insert, module_of
from compressor.spec import Role, TensorHeader

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def saved(folder: Path, config: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A random model, and the tensors of the checkpoint that it saves."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def roles(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], family: Family | None = None
) -> dict[str, Role]:
    """The role of each tensor, from its header alone."""
    family = family or family_for(config)
    return {
        name: family.role(TensorHeader(name, "F32", tuple(tensor.shape)), config)
        for name, tensor in tensors.items()
    }


def kinds(found: dict[str, Role], kind: str) -> set[str]:
    """Names of the tensors with a role."""
    return {name for name, role in found.items() if role.kind == kind}


@pytest.mark.parametrize("model_type", LlamaFamily.model_types)
def test_dense_families_take_exactly_the_linear_layers(tmp_path, model_type):
    """The linear roles are the ``nn.Linear`` modules but the head, part for part the whole weight."""
    config = transformers.AutoConfig.for_model(model_type, **SMALL)
    model, tensors = saved(tmp_path, config)
    found = roles(tensors, config.to_dict())
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert kinds(found, "linear") == linear
    assert kinds(found, "embedding") == {"model.embed_tokens.weight"}
    for name in linear:
        (part,) = found[name].parts
        assert part.module == module_of(name)
        torch.testing.assert_close(extract(tensors[name], part), tensors[name], rtol=0, atol=0)
    assert all(role.reason for role in found.values() if role.kind != "linear")
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied(config.to_dict(), tensors) == is_tied
    assert kinds(found, "lm_head") == (set() if is_tied else {"lm_head.weight"})


def test_fused_neighbours_share_a_group():
    """q/k/v and gate/up of one layer; Phi-3's fused tensors are groups of one, the rest stands alone."""
    family = BUILTINS[0]

    def group(name: str) -> str | None:
        (part,) = family.role(TensorHeader(f"model.layers.1.{name}.weight", "BF16", (8, 8)), {}).parts
        return part.fuse_group

    assert {group(f"self_attn.{kind}_proj") for kind in "qkv"} == {"model.layers.1.self_attn.qkv_proj"}
    assert {group(f"mlp.{kind}_proj") for kind in ("gate", "up")} == {"model.layers.1.mlp.gate_up_proj"}
    for stored_fused in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        assert group(stored_fused) == f"model.layers.1.{stored_fused}"
    for alone in ("self_attn.o_proj", "mlp.down_proj"):
        assert group(alone) is None


def llama4_text(**changes: Any) -> Any:
    """A tiny Llama 4 whose first of two layers is dense."""
    return transformers.Llama4TextConfig(
        **{
            **SMALL,
            "intermediate_size_mlp": 56,
            "num_local_experts": 3,
            "interleave_moe_layer_step": 2,
            **changes,
        }
    )


def test_llama4_parts_reproduce_the_experts_forward(tmp_path):
    """Experts computed one by one from their parts equal transformers' fused experts."""
    config = llama4_text()
    model, tensors = saved(tmp_path, config)
    found = roles(tensors, config.to_dict())
    experts = "model.layers.1.feed_forward.experts"
    weights = {
        part.module: extract(tensors[name], part)
        for name in (f"{experts}.gate_up_proj", f"{experts}.down_proj")
        for part in found[name].parts
    }
    x_ETH = torch.randn(3, 5, 32)
    fused = model.get_submodule(experts)(x_ETH.reshape(-1, 32)).reshape(3, 5, 32)
    for expert in range(3):
        gate_IH, up_IH, down_HI = (
            weights[f"{experts}.{expert}.{kind}_proj"] for kind in ("gate", "up", "down")
        )
        hidden = nn.functional.silu(x_ETH[expert] @ gate_IH.T) * (x_ETH[expert] @ up_IH.T)
        torch.testing.assert_close(hidden @ down_HI.T, fused[expert])


def test_llama4_expert_parts_are_plain_slices_and_go_back(tmp_path):
    """Gate is the first half of the columns; parts put together again are the source tensor."""
    config = llama4_text()
    _, tensors = saved(tmp_path, config)
    found = roles(tensors, config.to_dict())
    for name in ("gate_up_proj", "down_proj"):
        tensor = tensors[f"model.layers.1.feed_forward.experts.{name}"]
        parts = found[f"model.layers.1.feed_forward.experts.{name}"].parts
        for part in parts:
            start = 48 if part.module.endswith(".up_proj") else 0
            expected = tensor[part.expert, :, start : start + part.out_features].T
            torch.testing.assert_close(extract(tensor, part), expected, rtol=0, atol=0)
        rebuilt = insert([(part, extract(tensor, part)) for part in parts], tuple(tensor.shape))
        torch.testing.assert_close(rebuilt, tensor, rtol=0, atol=0)


def test_a_number_of_layers_that_is_none_is_passed_over():
    """``true`` is not one layer."""
    header = TensorHeader("model.layers.1.mlp.up_proj.weight", "BF16", (8, 8))
    assert BUILTINS[0].role(header, {"num_hidden_layers": True}).kind == "linear"
    assert BUILTINS[0].role(header, {"num_hidden_layers": 1}).kind == "other"


def test_llama4_roles_of_a_mixed_model(tmp_path):
    """Dense layer, shared expert and experts are linear, router and norms not; groups are the engine's."""
    config = llama4_text()
    _, tensors = saved(tmp_path, config)
    found = roles(tensors, config.to_dict())
    attention = {f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in "qkvo"}
    dense = {f"model.layers.0.feed_forward.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    moe = "model.layers.1.feed_forward"
    shared = {f"{moe}.shared_expert.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    fused = {f"{moe}.experts.gate_up_proj", f"{moe}.experts.down_proj"}
    assert kinds(found, "linear") == attention | dense | shared | fused
    assert found[f"{moe}.router.weight"].reason == "router"
    groups = [(part.module, part.fuse_group) for part in found[f"{moe}.experts.gate_up_proj"].parts]
    assert groups == [
        (f"{moe}.experts.{expert}.{half}_proj", f"{moe}.experts.{expert}.gate_up_proj")
        for expert in range(3)
        for half in ("gate", "up")
    ]
    assert (
        found[f"{moe}.shared_expert.up_proj.weight"].parts[0].fuse_group
        == f"{moe}.shared_expert.gate_up_proj"
    )
    # A checkpoint whose experts were already written one by one.
    single = TensorHeader(f"{moe}.experts.2.up_proj.weight", "BF16", (48, 32))
    (part,) = family_for(config.to_dict()).role(single, config.to_dict()).parts
    assert part.fuse_group == f"{moe}.experts.2.gate_up_proj"


def test_llama4_with_vision_keeps_the_tower_in_16_bit(tmp_path):
    """Only the language model's projections are linear; names carry its prefix."""
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    config = transformers.Llama4Config(text_config=llama4_text().to_dict(), vision_config=vision)
    torch.manual_seed(0)
    transformers.Llama4ForConditionalGeneration(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    found = roles(tensors, config.to_dict())
    linear = kinds(found, "linear")
    assert linear
    assert all(name.startswith("language_model.model.layers.") for name in linear)
    assert kinds(found, "lm_head") == {"language_model.lm_head.weight"}
    assert kinds(found, "embedding") == {"language_model.model.embed_tokens.weight"}
    tower = [role for name, role in found.items() if not name.startswith("language_model.")]
    assert len(tower) > 10
    assert {role.reason for role in tower} == {"tower or projector of another modality"}


GENERIC = {
    "mixtral": (
        {"num_local_experts": 2, "num_experts_per_tok": 1},
        {"self_attn.q_proj", "block_sparse_moe.experts.N.w1", "block_sparse_moe.experts.N.w2"},
        {"block_sparse_moe.gate": "router or gate"},
    ),
    "qwen3_moe": (
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
        {"self_attn.o_proj", "mlp.experts.N.gate_proj", "mlp.experts.N.down_proj"},
        {"mlp.gate": "router or gate", "self_attn.q_norm": "norm"},
    ),
    "qwen3_next": (
        {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        {
            "linear_attn.in_proj_qkvz",
            "linear_attn.out_proj",
            "mlp.experts.N.up_proj",
            "mlp.shared_expert.up_proj",
        },
        {
            "linear_attn.conv1d": "convolution",
            "linear_attn.in_proj_ba": "small state or gate weight",
            "mlp.shared_expert_gate": "router or gate",
        },
    ),
    "jamba": (
        {
            "num_hidden_layers": 6,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        {"feed_forward.experts.N.gate_proj", "feed_forward.gate_proj", "self_attn.k_proj"},
        {"mamba.x_proj": "Mamba mixer", "feed_forward.router": "router or gate"},
    ),
    "gpt2": (
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16},
        set(),
        {"mlp.c_fc": "stored transposed (Conv1D), which this version does not read"},
    ),
}


@pytest.mark.parametrize("model_type", GENERIC)
def test_the_fallback_tells_projections_from_the_rest(tmp_path, model_type):
    """Named examples of both, and no vector or table among the linear ones; of other families as well."""
    changes, linear, other = GENERIC[model_type]
    common = {} if model_type == "gpt2" else SMALL
    config = transformers.AutoConfig.for_model(model_type, **{**common, **changes})
    _, tensors = saved(tmp_path, config)
    family = GenericFamily(model_type)
    found = roles(tensors, config.to_dict(), family)

    def short(name: str) -> str:
        components = name.removesuffix(".weight").split(".")
        inside = components[components.index("layers" if "layers" in components else "h") + 2 :]
        return ".".join("N" if component.isdecimal() else component for component in inside)

    taken = kinds(found, "linear")
    assert linear <= {short(name) for name in taken}
    assert all(tensors[name].ndim == 2 and min(tensors[name].shape) > 1 for name in taken)
    inside = [name for name in found if ".layers." in name or ".h." in name]
    told = {short(name): found[name].reason for name in inside}
    assert other.items() <= told.items()
    assert repr(model_type) in family.inferred


def test_the_fallback_copies_what_it_cannot_split():
    """3-D experts of unknown layout, other dtypes, draft layers: with the reason."""
    config = {"model_type": "new", "num_hidden_layers": 4}
    family = family_for(config)

    def reason(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> str:
        role = family.role(TensorHeader(name, dtype, shape), config)
        assert role.kind == "other"
        return role.reason

    assert "fused into one 3-D tensor" in reason("model.layers.0.mlp.experts.gate_up_proj", (4, 32, 64))
    assert "stored as U8" in reason("model.layers.0.mlp.up_proj.weight", (32, 32), "U8")
    assert "prediction" in reason("model.layers.4.mlp.up_proj.weight", (32, 32))
    assert "prediction" in reason("mtp.layers.0.mlp.up_proj.weight", (32, 32))
    assert "outside" in reason("model.fc.weight", (32, 32))
    assert "not a layer's weight" in reason("model.layers.0.mlp.experts_matrix", (32, 32))


def test_nested_and_unknown_configs_find_their_family():
    """The outer type first, then the text config's, then the fallback."""
    assert family_for({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}).name == "llama4"
    assert family_for({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}).name == "llama"
    assert family_for({"model_type": "new"}).name == "generic"
    assert family_for({}).name == "generic"
    assert text_config({"a": 1}) == {"a": 1}


class Elsewhere:
    """A family of another package."""

    name = "elsewhere"
    model_types = ("llama",)
    inferred = ""
    renamed = False

    def role(self, header: TensorHeader, config: dict[str, Any]) -> Role:
        return Role("other", reason="elsewhere")


def test_an_installed_family_comes_first_and_a_broken_one_is_named(monkeypatch):
    """Entry points of the group; an import error is a user's fault with the name in it."""

    def install(value: str) -> None:
        point = EntryPoint("theirs", value, registry.ENTRY_POINT_GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])
        registry.families.cache_clear()

    try:
        monkeypatch.setattr(f"{__name__}.Elsewhere.instance", Elsewhere(), raising=False)
        install(f"{__name__}:Elsewhere.instance")
        assert family_for({"model_type": "llama"}).name == "elsewhere"
        assert family_for({"model_type": "llama4"}).name == "llama4"
        install("no_such_module:family")
        with pytest.raises(UserError, match="'theirs' cannot be loaded"):
            family_for({"model_type": "llama"})
        install("math:pi")
        with pytest.raises(UserError, match="is a float"):
            family_for({"model_type": "llama"})
    finally:
        registry.families.cache_clear()


@pytest.mark.parametrize(
    "config, names, expected",
    [
        ({"tie_word_embeddings": True}, [], True),
        ({"tie_word_embeddings": True}, ["lm_head.weight"], True),
        ({"tie_word_embeddings": False}, ["lm_head.weight"], False),
        ({}, ["model.embed_tokens.weight"], True),
        ({}, ["model.embed_tokens.weight", "lm_head.weight"], False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, [], True),
        ({"tie_word_embeddings": True, "text_config": {}}, [], True),
    ],
)
def test_tied(config, names, expected):
    """The text config's key, then the outer one, then whether a head is stored."""
    assert tied(config, names) is expected


class Stored:
    """A scheme reduced to what it writes."""

    def __init__(self, label: str, **written: str) -> None:
        self.label = label
        self.written = written

    def outputs(self, module: str, out_features: int, in_features: int) -> tuple[TensorHeader, ...]:
        return tuple(TensorHeader(f"{module}.{name}", dtype, (1,)) for name, dtype in self.written.items())


PACKED = Stored("W8A16", weight_packed="I32", weight_scale="BF16", weight_shape="I64")
ASYMMETRIC = Stored("W4A16", weight_packed="I32", weight_zero_point="I32")
NVFP4 = Stored("NVFP4A16", weight_packed="U8", weight_scale="F8_E4M3")


@pytest.mark.parametrize(
    "name, scheme, is_tied, refused",
    [
        ("model.embed_tokens.weight", PACKED, False, None),
        ("model.embed_tokens.weight", ASYMMETRIC, False, "not from W4A16"),
        ("model.embed_tokens.weight", NVFP4, False, "not from NVFP4A16"),
        ("model.embed_tokens.weight", PACKED, True, "one tensor"),
        ("lm_head.weight", NVFP4, False, None),
        ("lm_head.weight", NVFP4, True, "one tensor"),
        ("model.layers.0.mlp.up_proj.weight", NVFP4, True, None),
    ],
)
def test_what_engines_accept_at_the_ends(name, scheme, is_tied, refused):
    """Heads as linear layers, embeddings as symmetric packed integers, tied pairs not at all."""
    role = BUILTINS[0].role(TensorHeader(name, "BF16", (40, 32)), {})
    problem = embedding_problem(role, scheme, tied=is_tied)
    assert (problem is None) == (refused is None)
    if refused and problem:
        assert refused in problem


def test_latent_attention_of_no_family() -> None:
    """What engines fold away stays in 16 bit there too, unless a rule names it."""
    config = {"model_type": "glm4_moe_lite", "num_hidden_layers": 2}
    family = family_for(config)
    assert family.name == "generic"
    found = {
        leaf: family.role(TensorHeader(f"model.layers.0.self_attn.{leaf}.weight", "BF16", (64, 32)), config)
        for leaf in ("kv_b_proj", "q_b_proj")
    }
    assert {leaf: role.kind for leaf, role in found.items()} == dict.fromkeys(found, "linear")
    assert "fold it" in found["kv_b_proj"].reason
    assert found["q_b_proj"].reason == ""
