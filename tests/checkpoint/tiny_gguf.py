"""Writes tiny GGUF files with the gguf library's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from tests.tiny import _byte_level_alphabet

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 128, 256, 4, 2, 32, 2
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
SPECIALS = ["<|end|>", "<|start|>", "<|stop|>"]
# bytes 0..255, the merged tokens, then the special ones
TOKENS = [*_byte_level_alphabet(), *(merge.replace(" ", "") for merge in MERGES), *SPECIALS]
UNK_ID, BOS_ID, EOS_ID = (TOKENS.index(token) for token in SPECIALS)
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def tiny_gguf(
    path: Path,
    arch: str = "llama",
    *,
    kind: str = "Q8_0",
    tied: bool = True,
    pre: str = "smollm",
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    without: str = "",
) -> Path:
    """Writes a random model of architecture ``arch`` whose matrices are stored as ``kind``.

    ``extra`` metadata and ``tensors`` are added; the tensor named ``without`` is left out.
    """
    writer = GGUFWriter(path, arch)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    if arch == "qwen3":
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
    _add_tokenizer(writer, pre)
    for key, value in (extra or {}).items():
        _add(writer, key, value)
    for name, shape in _shapes(arch, tied).items():
        if name != without:
            _add_tensor(writer, name, shape, kind)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(arch: str, tied: bool) -> dict[str, tuple[int, ...]]:
    """GGUF names and row-major shapes."""
    q_rows, kv_rows = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN)}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        block = {
            "attn_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
            "attn_q.weight": (q_rows, HIDDEN),
            "attn_k.weight": (kv_rows, HIDDEN),
            "attn_v.weight": (kv_rows, HIDDEN),
            "attn_output.weight": (HIDDEN, q_rows),
            "ffn_gate.weight": (INNER, HIDDEN),
            "ffn_up.weight": (INNER, HIDDEN),
            "ffn_down.weight": (HIDDEN, INNER),
        }
        if arch == "qwen2":
            block |= {"attn_q.bias": (q_rows,), "attn_k.bias": (kv_rows,), "attn_v.bias": (kv_rows,)}
        if arch == "qwen3":
            block |= {"attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"output_norm.weight": (HIDDEN,)}


def _add_tensor(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Random values, stored as ``kind`` if they are a matrix and as F32 if not."""
    values = np.random.default_rng(len(name) + sum(map(ord, name))).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        writer.add_tensor(name, values)
    else:
        number = GGMLQuantizationType[kind]
        writer.add_tensor(name, quantize(values, number), raw_dtype=number)


def _add_tokenizer(writer: GGUFWriter, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_unk_token_id(UNK_ID)
    writer.add_pad_token_id(EOS_ID)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    """One metadata entry of the type that fits the value; replaces an earlier one."""
    for entries in writer.kv_data:
        entries.pop(key, None)
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        assert isinstance(value, list)
        writer.add_array(key, value)
