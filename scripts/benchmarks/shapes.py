"""Models of random weights whose layers have the shapes of real ones, to time layers with.

    python -m scripts.benchmarks.shapes SHAPE LAYERS FOLDER

The vocabulary is that of bytes, so that next to nothing but layers is timed. ``tiny-*`` are for trials.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

# Llama-3.1-8B and Qwen3-30B-A3B, by their config.json.
_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
}
_QWEN3_MOE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rope_theta": 1000000.0,
}
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
_TINY |= {"head_dim": 16}
_TINY_MOE = _TINY | {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-8b": ("llama", _LLAMA_8B),
    "qwen3-moe": ("qwen3_moe", _QWEN3_MOE),
    "tiny-llama": ("llama", _TINY),
    "tiny-moe": ("qwen3_moe", _TINY_MOE),
}
# Bytes and two special tokens.
_VOCABULARY = 256
_POSITIONS = 8192


def write_model(shape: str, layers: int, folder: Path) -> None:
    """Writes a bf16 model with ``layers`` layers and a tokenizer of bytes; seeded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import write_byte_tokenizer

    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(
        kind,
        **sizes,
        num_hidden_layers=layers,
        vocab_size=_VOCABULARY,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=254,
        eos_token_id=255,
        pad_token_id=255,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    building = folder.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)
    model.cpu().save_pretrained(building)
    write_byte_tokenizer(building)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


if __name__ == "__main__":
    write_model(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
