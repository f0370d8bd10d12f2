"""The packed cache under models and ``generate``: with a codec that loses nothing, as ``DynamicCache``."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from compressor.errors import CheckpointError, UserError
from compressor.kv.base import KvCodec
from compressor.kv.cache import LayerCodecs, Mode, PackedCache, full_attention_layers
from compressor.kv.layer import PackedLayer
from tests.kv.codecs import Coarse, Plain, Plain16
from tests.model.zoo import FAMILIES

# What each family keeps packed; the rest is sliding, chunked, linear attention, convolutions or Mamba.
PACKED = {
    "llama": [0, 1],
    "llama4": [3],
    "qwen3_next": [1],
    "gemma3": [1],
    "gpt_oss": [1],
    "jamba": [1, 3],
    "lfm2": [1],
    "bloom": [0, 1],
    "gemma3_with_tower": [1],
}


def _model(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    FAMILIES[family](folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _cache(model: PreTrainedModel, codec: KvCodec, mode: Mode = "strict", **windows: int) -> PackedCache:
    layers = full_attention_layers(model.config)
    return PackedCache.of(model.config, {n: LayerCodecs(codec, codec, **windows) for n in layers}, mode)


def _generate(model: PreTrainedModel, ids: torch.Tensor, cache: Any, **more: Any) -> Any:
    return model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **{"attention_mask": torch.ones_like(ids), "pad_token_id": 255, **more},
    )


def _same(first: Any, second: Any) -> None:
    assert torch.equal(first.sequences, second.sequences)
    for one, other in zip(first.logits, second.logits, strict=True):
        assert torch.equal(one, other)


def _prompt(batch: int = 2, tokens: int = 12) -> torch.Tensor:
    return torch.randint(250, (batch, tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", PACKED)
def test_generate_with_a_lossless_codec_is_as_with_the_usual_cache(family: str, tmp_path: Path) -> None:
    """Tokens and logits to the bit; every layer that is not full attention keeps transformers' own cache."""
    model = _model(family, tmp_path)
    assert full_attention_layers(model.config) == PACKED[family]
    cache, usual = _cache(model, Plain()), DynamicCache(config=model.config)
    _same(_generate(model, _prompt(), cache), _generate(model, _prompt(), usual))
    assert cache.get_seq_length() == usual.get_seq_length() == 12 + 23
    for number, (layer, kept) in enumerate(zip(cache.layers, usual.layers, strict=True)):
        assert type(layer) is (PackedLayer if number in PACKED[family] else type(kept))


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "gemma3"])
def test_bytes_count_packed_layers_exactly_and_others_in_16_bit(family: str, tmp_path: Path) -> None:
    """Against the usual cache's tensors: full layers at the codec's bytes, others at 2 each."""
    model = _model(family, tmp_path)
    cache, usual = _cache(model, Coarse()), DynamicCache(config=model.config)
    for each in (cache, usual):
        with torch.no_grad():
            model(_prompt(), past_key_values=each, use_cache=True)
    expected = 0
    for number, layer in enumerate(usual.layers):
        if getattr(layer, "keys", None) is not None:
            expected += (layer.keys.numel() + layer.values.numel()) * (1 if number in PACKED[family] else 2)
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            expected += sum(state.nbytes for state in states.values())
    assert cache.nbytes() == expected
    none = PackedCache.of(model.config, {})
    with torch.no_grad():
        model(_prompt(), past_key_values=none, use_cache=True)
    packed = [usual.layers[number] for number in PACKED[family]]
    assert none.nbytes() - expected == sum(layer.keys.numel() + layer.values.numel() for layer in packed)
    read = max(layer.keys.nbytes + layer.values.nbytes for layer in packed)
    assert cache.peak_nbytes() == cache.allocated_nbytes() + read


def test_a_16_bit_model_is_kept_whole_by_sink_and_window_too(tmp_path: Path) -> None:
    """In bfloat16 nothing is rounded on its way into sink, slots or window."""
    model = _model("llama", tmp_path, torch.bfloat16)
    usual = _generate(model, _prompt(), DynamicCache(config=model.config))
    _same(_generate(model, _prompt(), _cache(model, Plain16())), usual)
    windowed = _cache(model, Plain16(), sink_tokens=2, recent_tokens=5)
    _same(_generate(model, _prompt(), windowed), usual)


def test_padded_prompts_of_a_batch_go_their_own_ways(tmp_path: Path) -> None:
    """With left padding, each row as the usual cache has it; the coarse codec shows that slots were read."""
    model = _model("llama", tmp_path)
    ids = _prompt()
    mask = torch.ones_like(ids)
    mask[0, :5], ids[0, :5] = 0, 255
    usual = _generate(model, ids, DynamicCache(config=model.config), attention_mask=mask)
    _same(_generate(model, ids, _cache(model, Plain()), attention_mask=mask), usual)
    lossy = _generate(model, ids, _cache(model, Coarse()), attention_mask=mask)
    assert not torch.equal(lossy.logits[0], usual.logits[0])


def test_beams_and_assisted_generation(tmp_path: Path) -> None:
    """Reordered and rolled-back caches; a recent window is refused where transformers would roll it back."""
    model = _model("llama", tmp_path)

    def run(cache: Any, **more: Any) -> torch.Tensor:
        found: torch.Tensor = _generate(model, _prompt(1), cache, **more).sequences
        return found

    usual = run(DynamicCache(config=model.config), num_beams=3)
    assert torch.equal(run(_cache(model, Plain()), num_beams=3), usual)
    greedy = run(DynamicCache(config=model.config))
    assert torch.equal(run(_cache(model, Plain()), prompt_lookup_num_tokens=3), greedy)


def test_a_copied_cache_goes_on_by_itself(tmp_path: Path) -> None:
    """A prompt's cache is copied for every continuation, as transformers' guides do."""
    model = _model("llama", tmp_path)
    ids, cache = _prompt(1), _cache(model, Coarse(), sink_tokens=2, recent_tokens=3)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        before = cache.nbytes()
        first, second = (
            model(ids[:, :4], past_key_values=deepcopy(cache), use_cache=True).logits for _ in range(2)
        )
    assert torch.equal(first, second)
    assert cache.nbytes() == before


def test_modes_differ_in_the_first_chunk_only(tmp_path: Path) -> None:
    """In ``vllm`` mode a prompt's logits are exact and the next token's are not; in ``strict`` neither."""
    model = _model("llama", tmp_path)
    ids = _prompt(1)
    found = {}
    with torch.no_grad():
        for mode in ("strict", "vllm"):
            cache = _cache(model, Coarse(), mode)
            found[mode] = [
                model(part, past_key_values=cache, use_cache=True).logits
                for part in (ids[:, :11], ids[:, 11:])
            ]
        exact = model(ids, use_cache=False).logits
    assert torch.allclose(found["vllm"][0], exact[:, :11], atol=1e-5)
    assert not torch.allclose(found["vllm"][1], exact[:, 11:], atol=1e-3)
    assert not torch.allclose(found["strict"][0], exact[:, :11], atol=1e-3)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_refused(family: str, tmp_path: Path) -> None:
    """Its cache is no keys and values by head."""
    config = _model(family, tmp_path).config
    with pytest.raises(CheckpointError, match="multi-head latent attention"):
        PackedCache.of(config, {})


def test_layers_that_cannot_be_packed_are_refused(tmp_path: Path) -> None:
    """Sliding and linear layers, numbers beyond the model, heads that a codec does not take."""
    config = _model("gemma3", tmp_path).config
    both = LayerCodecs(Plain(), Coarse())
    for number in (0, 2):
        with pytest.raises(UserError, match=f"layer {number} has no full attention") as raised:
            PackedCache.of(config, {number: both})
        assert raised.value.fix == "layers with full attention: 1"
    config.head_dim = 7
    with pytest.raises(UserError, match="the values of layer 1 cannot be packed: heads of 7 are odd"):
        PackedCache.of(config, {1: both})
