"""Header sets and recipes for planner tests, without files."""

from __future__ import annotations

from compressor.spec import TensorHeader


def llama_headers(
    *, layers: int = 2, hidden: int = 128, wide: int = 256, kv: int = 64, vocab: int = 512, tied: bool = False
) -> dict[str, TensorHeader]:
    """Every tensor of a dense Llama checkpoint."""
    found = [TensorHeader("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        found += [TensorHeader(f"{prefix}.{name}.weight", "BF16", shape) for name, shape in shapes.items()]
        found += [
            TensorHeader(f"{prefix}.{norm}.weight", "BF16", (hidden,))
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
    found.append(TensorHeader("model.norm.weight", "BF16", (hidden,)))
    if not tied:
        found.append(TensorHeader("lm_head.weight", "BF16", (vocab, hidden)))
    return {header.name: header for header in found}


def llama4_headers(*, experts: int = 4, hidden: int = 64, wide: int = 128) -> dict[str, TensorHeader]:
    """The feed-forward tensors of two Llama 4 layers: experts fused in 3-D tensors."""
    found = []
    for layer in range(2):
        prefix = f"model.layers.{layer}.feed_forward"
        found += [
            TensorHeader(f"{prefix}.experts.gate_up_proj", "BF16", (experts, hidden, 2 * wide)),
            TensorHeader(f"{prefix}.experts.down_proj", "BF16", (experts, wide, hidden)),
            TensorHeader(f"{prefix}.router.weight", "BF16", (experts, hidden)),
            TensorHeader(f"{prefix}.shared_expert.gate_proj.weight", "BF16", (wide, hidden)),
            TensorHeader(f"{prefix}.shared_expert.up_proj.weight", "BF16", (wide, hidden)),
            TensorHeader(f"{prefix}.shared_expert.down_proj.weight", "BF16", (hidden, wide)),
        ]
    return {header.name: header for header in found}


LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "num_hidden_layers": 2}
LLAMA4 = {"model_type": "llama4_text", "tie_word_embeddings": False, "num_hidden_layers": 2}
