"""Writes the small model's folder: config.json, random weights, a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.safetensors_file import torch_dtype
from compressor.checkpoint.safetensors_writer import ShardWriter
from compressor.spec import TensorHeader

if TYPE_CHECKING:
    import torch

# Byte-level BPE without merges: one token a byte.
BYTE_TOKENS = 256
_SPREAD = 0.05
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_weights(
    folder: Path, config: Mapping[str, Any], headers: Mapping[str, TensorHeader], seed: int
) -> None:
    """Writes config.json and one shard of random tensors, each drawn from its name and the seed."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with ShardWriter(folder / "model.safetensors", list(headers.values())) as writer:
        for header in headers.values():
            writer.write(header.name, _random(header, seed))


def _random(header: TensorHeader, seed: int) -> torch.Tensor:
    """Small normal values; vectors that are no biases lie around one, integers count."""
    import torch

    dtype = torch_dtype(header.dtype)
    if not dtype.is_floating_point:
        return torch.arange(header.numel).reshape(header.shape).to(dtype)
    digest = hashlib.sha256(f"{seed} {header.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    noise = torch.randn(header.shape, generator=generator) * _SPREAD
    scales = len(header.shape) == 1 and not header.name.endswith("bias")
    return (noise + 1 if scales else noise).to(dtype)


def write_byte_tokenizer(folder: Path, special: Mapping[str, int]) -> None:
    """Writes a tokenizer of bytes; ``special`` are the further tokens, name -> id from ``BYTE_TOKENS`` on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == BYTE_TOKENS
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    by_id = {index: f"<{name}>" for name, index in sorted(special.items(), reverse=True)}
    tokenizer.add_special_tokens([by_id[index] for index in sorted(by_id)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=by_id[special["bos"]],
        eos_token=by_id[special["eos"]],
        chat_template=_TEMPLATE,
    )
    fast.save_pretrained(folder)
