"""Tiny random models in Hugging Face folders, for tests of every room.

All dimensions are arguments, so that each scheme finds a width that it can block: 16 (NVFP4), 32 and 64
(INT4 groups), 128 (FP8 blocks). The weights have a spread of 0.1 and the norms differ from one, so that a
swapped, dropped or transposed tensor changes the logits visibly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPREAD = 0.1
# Bytes 0xFE and 0xFF never occur in UTF-8: their ids are free for the special tokens.
BYTE_TOKENS = 254
BOS_ID, EOS_ID = 254, 255
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_byte_tokenizer(folder: Path) -> None:
    """Writes a tokenizer whose ids 0..253 are the bytes of UTF-8 text, 254 ``<s>`` and 255 ``</s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: byte for byte, token in enumerate(_byte_level_alphabet()[:BYTE_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


def tiny_llama(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 256,
    shards: int = 1,
    tie: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes a random ``LlamaForCausalLM`` with a byte tokenizer into ``folder`` and returns it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **_common(layers, hidden, heads, kv_heads, vocab, tie), intermediate_size=intermediate, dtype=dtype
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _save(LlamaForCausalLM(config), folder, shards, dtype)
    return folder


def tiny_llama4(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    intermediate_dense: int = 192,
    experts: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 256,
    moe_step: int = 1,
    shards: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes a random ``Llama4ForCausalLM`` (experts fused into 3-D tensors) into ``folder`` and returns it.

    Every ``moe_step``-th layer has experts; the others are dense with ``intermediate_dense``.
    """
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **_common(layers, hidden, heads, kv_heads, vocab, tie=False),
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        intermediate_size_mlp=intermediate_dense,
        num_local_experts=experts,
        interleave_moe_layer_step=moe_step,
        attention_chunk_size=256,
        dtype=dtype,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _save(Llama4ForCausalLM(config), folder, shards, dtype)
    return folder


def tiny_model(
    folder: Path, model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype, *, seed: int = 0
) -> Path:
    """Writes a random model of any class with a byte tokenizer into ``folder`` and returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _save(model_class(config), folder, 1, dtype)
    return folder


def tokens_of_bytes() -> dict[str, Any]:
    """The configuration that goes with the byte tokenizer."""
    return {
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
    }


def _common(layers: int, hidden: int, heads: int, kv_heads: int, vocab: int, tie: bool) -> dict[str, Any]:
    """Configuration that the tiny families share."""
    assert vocab > EOS_ID, "the byte tokenizer needs 256 ids"
    return {
        **tokens_of_bytes(),
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tie,
    }


@torch.no_grad()
def _save(model: PreTrainedModel, folder: Path, shards: int, dtype: torch.dtype) -> None:
    """Fills the parameters at random, saves the folder and cuts its weights into ``shards`` files."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape) * SPREAD
        parameter.copy_(noise + 1 if parameter.dim() == 1 else noise)
    model.to(dtype).save_pretrained(folder)
    write_byte_tokenizer(folder)
    if shards > 1:
        _cut(folder, shards)


def _cut(folder: Path, shards: int) -> None:
    """Replaces ``model.safetensors`` by ``shards`` files and an index."""
    from safetensors.torch import load_file, save_file

    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    assert len(names) >= shards
    weight_map = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _byte_level_alphabet() -> list[str]:
    """The printable stand-in of each byte 0..255 in byte-level BPE (openai/gpt-2 src/encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable}
    stand_in.update({byte: chr(256 + position) for position, byte in enumerate(hidden)})
    return [stand_in[byte] for byte in range(256)]
