"""What is heard is what transformers' own cache stores, and hearing changes nothing.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compressor.checkpoint.folder import FolderSource
from compressor.errors import CheckpointError
from compressor.model.attention_heard import HeardAttention, check_hearable, heard_attention
from compressor.model.hidden import HiddenStates
from compressor.model.tape import Tape
from tests.model.zoo import FAMILIES

IDS_BT = torch.arange(24).reshape(2, 12) * 7 % 250


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "qwen3_next", "llama4", "jamba"])
def test_hears_what_caches_store(family: str, attention: str, tmp_path: Path) -> None:
    """Keys after rotary positions, and values, of each KV head; logits and the table stay as they were."""
    model = AutoModelForCausalLM.from_pretrained(FAMILIES[family](tmp_path), attn_implementation=attention)
    heard: dict[int, HeardAttention] = {}
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        plain = model(IDS_BT, past_key_values=cache).logits
        with heard_attention(model, lambda call: heard.update({call.layer: call})):
            assert torch.equal(model(IDS_BT, use_cache=False).logits, plain)
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping.keys() & {"sdpa", "eager"}
    stored = {
        index: layer for index, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None
    }
    assert heard
    assert set(heard) == {index for index, layer in stored.items() if layer.keys.numel()}
    for index, call in heard.items():
        kept = stored[index].keys.shape[2]  # sliding layers keep fewer
        assert torch.equal(call.key_BHTD[:, :, -kept:], stored[index].keys)
        assert torch.equal(call.value_BHTD[:, :, -kept:], stored[index].values)
        # The attention can be run again, and its result depends on what it is given.
        again = call.attend(call.key_BHTD, call.value_BHTD)
        assert again.shape == (2, 12, call.query_BQTD.shape[1], call.query_BQTD.shape[3])
        doubled = call.attend(call.key_BHTD, 2 * call.value_BHTD)
        torch.testing.assert_close(doubled, 2 * again)


def test_reads_what_it_is_given(tmp_path: Path) -> None:
    """Other values take the place of the model's own."""
    model = AutoModelForCausalLM.from_pretrained(FAMILIES["llama"](tmp_path))
    with torch.inference_mode():
        plain = model(IDS_BT, use_cache=False).logits
        with heard_attention(model, lambda call: (call.key_BHTD, call.value_BHTD.clone())):
            assert torch.equal(model(IDS_BT, use_cache=False).logits, plain)
        with heard_attention(model, lambda call: (call.key_BHTD, 0 * call.value_BHTD)):
            assert not torch.equal(model(IDS_BT, use_cache=False).logits, plain)


def test_blocks_of_a_tape(tmp_path: Path) -> None:
    """A block of the tape tells what the whole model tells."""
    source = FolderSource(FAMILIES["llama"](tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    whole: dict[int, HeardAttention] = {}
    with torch.inference_mode(), heard_attention(model, lambda call: whole.update({call.layer: call})):
        model(IDS_BT, use_cache=False)
    cpu = torch.device("cpu")
    states = HiddenStates(cpu)
    tape = Tape.record(source, [IDS_BT], dtype=torch.float32, device=cpu, states=states)
    for index in range(len(tape.blocks)):
        block = tape.place(tape.load(index))
        heard: list[HeardAttention] = []
        with heard_attention(block.module, heard.append):
            made = tape.run(block, states, 0)
        assert made is not None
        states.put(0, made)
        (call,) = heard
        assert call.layer == index
        assert torch.equal(call.key_BHTD, whole[index].key_BHTD)
        assert torch.equal(call.query_BQTD, whole[index].query_BQTD)


def test_other_models_are_not_heard(tmp_path: Path) -> None:
    """Only the module that was named is listened to."""
    one = AutoModelForCausalLM.from_pretrained(FAMILIES["llama"](tmp_path / "one"))
    other = AutoModelForCausalLM.from_pretrained(FAMILIES["qwen3"](tmp_path / "other"))
    heard: list[HeardAttention] = []
    with torch.inference_mode(), heard_attention(one, heard.append):
        other(IDS_BT, use_cache=False)
    assert not heard


def test_latent_attention_is_refused(tmp_path: Path) -> None:
    """From the config, before anything is loaded."""
    with pytest.raises(CheckpointError, match="latent attention caches one latent vector"):
        check_hearable(FolderSource(FAMILIES["deepseek_v3"](tmp_path / "mla")))
    check_hearable(FolderSource(FAMILIES["llama"](tmp_path / "llama")))
