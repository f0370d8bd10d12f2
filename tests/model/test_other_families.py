"""Families that are not plain decoders: wrappers, gpt-oss, DeepSeek-V4."""

from __future__ import annotations

import re

import pytest
import transformers
from safetensors.torch import load_file

from compressor.model.families import family_for, is_wrapper, renames_modules
from compressor.spec import TensorHeader
from tests.model.test_families import kinds, roles
from tests.model.wrappers import WRAPPERS
from tests.model.zoo import FAMILIES


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_take_the_text_decoder_only(tmp_path, name):
    """By the outer and by the text's model type; embeddings and heads are known under every prefix."""
    folder = WRAPPERS[name](tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    tensors = load_file(folder / "model.safetensors")
    found = roles(tensors, config)
    assert not family_for(config).inferred
    towers = [name for name in tensors if re.search(r"vision|visual|projector", name)]
    assert len(towers) > 10
    assert {found[name].reason for name in towers} == {"tower or projector of another modality"}
    linear = kinds(found, "linear")
    assert len(linear) == 2 * (9 if name == "llama4_with_tower" else 7)
    assert all(found[name].input_norm for name in linear if name.endswith(".q_proj.weight"))
    assert len(kinds(found, "embedding")) == 1
    assert len(kinds(found, "lm_head")) == (0 if name == "gemma3_with_tower" else 1)
    assert is_wrapper(config)


def test_a_flat_config_of_a_wrapper():
    """Qwen2.5-VL as its checkpoints were first published."""
    config = {"model_type": "qwen2_5_vl", "num_hidden_layers": 2, "vision_config": {"depth": 1}}
    assert is_wrapper(config)
    role = family_for(config).role(TensorHeader("model.layers.0.mlp.up_proj.weight", "BF16", (8, 8)), config)
    assert role.kind == "linear"
    assert role.input_norm is not None
    assert not is_wrapper({"model_type": "llama"})


def test_gpt_oss_takes_attention_only(tmp_path):
    """Experts are refused with what the engine loads instead; the plan's rules say so too."""
    folder = FAMILIES["gpt_oss"](tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    found = roles(load_file(folder / "model.safetensors"), config)
    attention = {f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in "qkvo"}
    assert kinds(found, "linear") == attention
    experts = [
        role for name, role in found.items() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]
    assert len(experts) == 4
    assert all("vLLM 0.32 loads them in 16 bit or in OpenAI's own MXFP4" in role.reason for role in experts)
    assert found["model.layers.0.mlp.router.weight"].reason == "router"
    assert found["model.layers.0.mlp.experts.down_proj_bias"].reason == "bias"
    assert renames_modules(config)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_deepseek_v4(tmp_path, prefix):
    """Named as transformers saves it and as it is published; the queries' and the cache's share a scale."""
    folder = FAMILIES["deepseek_v4"](tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    tensors = {
        name.replace("model.", prefix, 1): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    found = roles(tensors, config)
    linear = kinds(found, "linear")
    inside = {name.partition("layers.1.")[2] for name in linear if "layers.1." in name}
    assert {name for name in inside if "experts.0." not in name and ".experts." in name} <= {
        f"ffn.experts.{expert}.w{number}.weight" for expert in (1, 2, 3) for number in (1, 2, 3)
    }
    assert {name for name in inside if ".experts." not in name} == {
        *(f"attn.{kind}.weight" for kind in ("wq_a", "wq_b", "wkv", "wo_b")),
        *(f"ffn.shared_experts.w{number}.weight" for number in (1, 2, 3)),
    }
    block = f"{prefix}layers.1"
    groups = {found[f"{block}.attn.{kind}.weight"].parts[0].fuse_group for kind in ("wq_a", "wkv")}
    assert groups == {f"{block}.attn.fused_wqa_wkv"}
    for name in linear:
        norm = found[name].input_norm
        assert (norm is None) == name.endswith(("wo_b.weight", "w2.weight"))
        assert norm is None or tuple(tensors[norm.tensor].shape) == tuple(tensors[name].shape[1:])
    assert kinds(found, "lm_head") == {"head.weight"}
    assert len(kinds(found, "embedding")) == 1
    assert found[f"{block}.attn.indexer.wq_b.weight"].reason == "sparse-attention indexer"
    assert found[f"{block}.attn.compressor.wkv.weight"].reason == "compressor of the key-value cache"
    assert found[f"{block}.hc_attn_fn"].reason == "hyper-connection"
    assert found[f"{block}.attn.compressor.ape"].kind == "other"
