"""Folded sources: every family computes the same with them, with other keys and values."""

from __future__ import annotations

import pytest
import torch

from compressor.checkpoint.folded import FoldedSource, KvFold
from compressor.checkpoint.folder import FolderSource
from compressor.errors import CheckpointError
from compressor.model.kv_folding import Foldable, foldable
from compressor.model.load import load_source_model
from compressor.spec import TensorHeader
from tests.model.zoo import FAMILIES

IDS = torch.arange(24).view(2, 12) * 7 % 250
BOTH = ["llama", "llama_yarn", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma", "gemma2", "gemma3"]
BOTH += ["granite", "olmo2", "mixtral", "qwen2_moe", "qwen3_moe", "llama4", "gpt_oss", "jamba"]
GATED = ["qwen3_next", "qwen3_5", "qwen3_5_moe"]


def factors(can: Foldable) -> dict[int, torch.Tensor]:
    """Random factors for every layer that can have them, equal in each pair that RoPE turns."""
    torch.manual_seed(1)
    found = {}
    for layer in can.keys:
        factor_HD = torch.exp2(torch.randn(can.key_heads, can.head_dim))
        half = can.rotary_dim // 2
        factor_HD[:, half : 2 * half] = factor_HD[:, :half]
        found[layer] = factor_HD
    return found


def heard(model) -> dict[str, list[torch.Tensor]]:
    """Keys and values that the model's cache holds after the ids, by layer."""
    cache = model(IDS, use_cache=True).past_key_values
    kept = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return {"keys": [layer.keys for layer in kept], "values": [layer.values for layer in kept]}


@pytest.mark.parametrize("name", BOTH + GATED)
def test_a_family_computes_the_same(name, tmp_path):
    """Logits in fp32 within rounding; keys and values are others, as they should be."""
    source = FolderSource(FAMILIES[name](tmp_path))
    can = foldable(source.headers, source.config)
    fold = KvFold(tuple(can.values), factors(can))
    assert bool(can.values) == (name not in GATED)
    assert can.keys
    plain = load_source_model(source, torch.float32)
    folded = load_source_model(FoldedSource(source, fold, exact=True), torch.float32)
    with torch.no_grad():
        before, after = plain(IDS).logits, folded(IDS).logits
        cached, changed = heard(plain), heard(folded)
    # Sums of a few dozen fp32 products in another order, through a few layers.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    for part, layers in (("keys", can.keys), ("values", can.values)):
        moved = [_moved(*pair) for pair in zip(cached[part], changed[part], strict=True)]
        assert sum(moved) == len(layers)


def _moved(before: torch.Tensor, after: torch.Tensor) -> bool:
    return float((after - before).norm()) > 0.1 * float(before.norm())


def test_keys_and_values_are_what_the_fold_says(tmp_path):
    """Against the definition: values times a dense Hadamard matrix, keys times their factors."""
    source = FolderSource(FAMILIES["qwen2"](tmp_path))
    can = foldable(source.headers, source.config)
    factor = factors(can)
    plain = load_source_model(source, torch.float32)
    folded = load_source_model(FoldedSource(source, KvFold((0, 1), factor), exact=True), torch.float32)
    with torch.no_grad():
        cached, changed = heard(plain), heard(folded)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 8:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    torch.testing.assert_close(changed["values"][0], cached["values"][0] @ hadamard / 8**0.5)
    torch.testing.assert_close(changed["keys"][0], cached["keys"][0] * factor[0][:, None, :])


@pytest.mark.parametrize(
    ("name", "values", "keys"),
    [
        ("qwen3_next", "gate", ""),
        ("deepseek_v3", "MLA", "MLA"),
        ("olmo", "not known", "not known"),
        ("gpt2", "not known", "not known"),
        ("gemma3n", "not known", "not known"),
    ],
)
def test_what_cannot_be_folded_has_a_reason(name, values, keys, tmp_path):
    """And no layers."""
    config = {"model_type": name}
    if name in FAMILIES:
        source = FolderSource(FAMILIES[name](tmp_path))
        can = foldable(source.headers, source.config)
    else:
        can = foldable({}, config)
    assert values in can.no_values
    assert bool(can.values) is False
    assert keys in can.no_keys
    assert bool(can.keys) is (keys == "")


def test_llama4_has_factors_only_where_there_is_no_rope(tmp_path):
    """Its RoPE turns neighbours, whether keys are normalised afterwards or not."""
    from tests.model.zoo import _of

    for norm in (True, False):
        settings = {"num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0], "use_qk_norm": norm}
        make = _of("Llama4ForCausalLM", "Llama4TextConfig", intermediate_size_mlp=40, **settings)
        source = FolderSource(make(tmp_path / str(norm)))
        assert sorted(foldable(source.headers, source.config).keys) == [0, 3]


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), -1.0, 2.0, 10**400])
def test_hostile_rotary_factors(factor, tmp_path):
    """Configs come from strangers: no traceback, no more coordinates than a head has."""
    source = FolderSource(FAMILIES["llama"](tmp_path))
    config = source.config | {"rope_parameters": {"partial_rotary_factor": factor}}
    can = foldable(source.headers, config)
    assert can.rotary_dim == can.head_dim


@pytest.mark.parametrize("leaf", ["q_proj.weight", "k_proj.bias", "v_proj.weight"])
def test_tensors_without_dimensions(leaf, tmp_path):
    """Nothing is folded, and the reason is told."""
    source = FolderSource(FAMILIES["llama"](tmp_path))
    name = f"model.layers.0.self_attn.{leaf}"
    can = foldable({**source.headers, name: TensorHeader(name, "F32", ())}, source.config)
    assert "names and shapes" in can.no_values


def test_head_dims_that_are_no_powers_of_two(tmp_path):
    """Keys can still be scaled."""
    from tests.model.zoo import _of

    source = FolderSource(_of("LlamaForCausalLM", "LlamaConfig", head_dim=12)(tmp_path))
    can = foldable(source.headers, source.config)
    assert "power of two" in can.no_values
    assert not can.values
    assert sorted(can.keys) == [0, 1]


def test_rounded_tensors_have_the_sources_dtype_and_others_its_bits(tmp_path):
    """Bit-equal where nothing is folded; another fingerprint."""
    source = FolderSource(FAMILIES["llama"](tmp_path))
    folded = FoldedSource(source, KvFold((0,)))
    assert set(folded.changed) == {
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
    }
    for name in source.headers:
        mine, other = folded.read(name), source.read(name)
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other) == (name not in folded.changed)
    assert folded.fingerprint != source.fingerprint


def test_a_fold_is_read_back_as_it_was_written(tmp_path):
    """And told apart from files that are none."""
    fold = KvFold((1, 3), {1: torch.rand(2, 8) + 0.5})
    fold.write(tmp_path)
    again = KvFold.read(tmp_path)
    assert again.values == fold.values
    assert torch.equal(again.keys[1], fold.keys[1])
    assert again.digest() == fold.digest()
    (tmp_path / "kv_fold.tensors").write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError):
        KvFold.read(tmp_path)


def test_a_layer_is_rotated_once(tmp_path):
    """Listed twice it would be the source's own, and called rotated."""
    KvFold((1, 1)).write(tmp_path)
    with pytest.raises(CheckpointError, match="listed twice"):
        KvFold.read(tmp_path)


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (KvFold((7,)), "values of layer 7"),
        (KvFold(keys={7: torch.ones(2, 8)}), "keys of layer 7"),
        (KvFold(keys={0: torch.ones(1, 8)}), "key factors are [1, 8]"),
        (KvFold(keys={0: -torch.ones(2, 8)}), "not all positive"),
        (KvFold(keys={0: torch.full((2, 8), float("nan"))}), "finite"),
        (KvFold(keys={0: torch.full((2, 8), 3e38)}), "not all between"),
        (KvFold(keys={0: torch.full((2, 8), 1e-38)}), "not all between"),
        (KvFold(keys={0: torch.arange(1.0, 17.0).view(2, 8)}), "RoPE"),
    ],
)
def test_folds_of_other_models_are_refused(fold, message, tmp_path):
    """Folds come with checkpoints from strangers."""
    source = FolderSource(FAMILIES["llama"](tmp_path))
    with pytest.raises(CheckpointError, match=message.replace("[", r"\[").replace("]", r"\]")):
        FoldedSource(source, fold)
