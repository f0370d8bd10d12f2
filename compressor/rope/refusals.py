"""Models and methods that do not go together, with the reason. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from compressor.rope.positions import Positions
from compressor.rope.spec import Method

Engine = Literal["transformers", "vllm"]
ENGINES: tuple[Engine, ...] = ("transformers", "vllm")

# Of these, transformers 5.17 drops the cache where a text passes the original length (their
# prepare_inputs_for_generation), so that short and long factors may differ.
SWITCHING = frozenset({"phi3", "phimoe", "phi4_multimodal"})
# vLLM 0.32 gives these the YaRN of DeepSeek (models/deepseek_v2.py), and transformers 5.17 the same.
_LATENT_YARN = frozenset({"deepseek_v2", "deepseek_v3"})
# vLLM 0.32 makes four times as many positions for videos of other models, and counts YaRN's blend from these
# (rotary_embedding/mrope.py); of those it does only where videos are pruned (models/qwen3_vl.py).
_IMAGES_YARN = frozenset({"qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_5_text", "qwen3_5_moe_text"})
# Their pairs are neighbours, which vLLM 0.32's longrope refuses.
_NEIGHBOURS = frozenset(
    {
        "cohere",
        "cohere2",
        "cohere2_moe",
        "glm",
        "glm4",
        "ernie4_5",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "helium",
        "gptj",
    }
)
# Their rotary positions take no scaling in transformers 5.17 or vLLM 0.32.
_FIXED = frozenset({"gptj", "codegen", "chatglm", "esm", "roformer"})
# transformers 5.17 refuses every other rope_type of these (modeling_ernie4_5_vl_moe.py).
_DEFAULT_ONLY = frozenset({"ernie4_5_vl_moe", "ernie4_5_vl_moe_text"})
_WITHOUT = frozenset({"bloom", "gpt2", "gpt_bigcode", "mamba", "mamba2", "mpt", "opt", "rwkv", "t5", "xglm"})


def family_refusal(positions: Positions) -> str:
    """Why no method can be used on a model, or ""."""
    kind, text = positions.model_type, positions.text
    if kind in _WITHOUT or text.get("alibi") is True:
        return f"model_type {kind!r} has no rotary positions"
    if kind in _FIXED:
        return f"engines take no scaling for model_type {kind!r}: its rotary positions are fixed"
    place = text.get("position_embedding_type")
    if isinstance(place, str) and not place.startswith("rope"):
        return f"position_embedding_type is {place!r}: no rotary positions"
    if kind == "recurrent_gemma":
        return "RecurrentGemma attends within a window alone: scaled frequencies would lengthen nothing"
    if kind.startswith("llama4"):
        return (
            "Llama 4 attends in chunks of 8192 tokens where it has rotary positions; its layers that reach "
            "further have none: scaled frequencies would lengthen nothing"
        )
    if positions.rope_type == "proportional":
        return "proportional frequencies (Gemma 4) are not scaled alike: vLLM 0.32 ignores their factor"
    return ""


def method_refusal(positions: Positions, method: Method, engines: Collection[Engine]) -> str:
    """Why a method cannot be used on a model, or ""."""
    kind = positions.model_type
    if method == "dynamic" and "vllm" in engines:
        return (
            "vLLM does not serve dynamic scaling: its frequencies do not change with the text, and its table "
            "of positions ends at the original length"
        )
    if kind in _DEFAULT_ONLY and method != "ntk":
        return f"transformers takes no scaling but a raised theta for model_type {kind!r}"
    if kind in SWITCHING and method not in ("longrope", "ntk"):
        return f"transformers reads no scaling but longrope for model_type {kind!r}"
    if positions.latent and method not in ("yarn", "ntk"):
        return "vLLM reads every scaling of a model with latent attention (MLA) as YaRN"
    if positions.latent and method == "yarn" and kind not in _LATENT_YARN:
        return f"engines scale attention of model_type {kind!r} under YaRN in ways of their own"
    if "mrope_section" in positions.parameters and method not in ("yarn", "ntk"):
        return f"vLLM drops the positions of images (mrope_section) under {method}"
    if method == "yarn" and yarn_is_misread(positions):
        return (
            f"vLLM takes four times the original length for YaRN's blend where model_type {kind!r} has "
            "positions of images (mrope_section): other frequencies than transformers'"
        )
    if method != "longrope":
        return ""
    if positions.kind is not None:
        return (
            f"layers of model_type {kind!r} have positions of several kinds: transformers fails there at the "
            "second text past the original length"
        )
    if kind in _NEIGHBOURS:
        return f"pairs of model_type {kind!r} are neighbouring dimensions, which vLLM's longrope refuses"
    return ""


def yarn_is_misread(positions: Positions) -> bool:
    """Whether vLLM 0.32 makes other frequencies of a model's YaRN than its config says."""
    return "mrope_section" in positions.parameters and positions.model_type not in _IMAGES_YARN


def instead(positions: Positions, engines: Collection[Engine]) -> str:
    """Methods that would do: the mend of a refusal."""
    methods: tuple[Method, ...] = ("yarn", "longrope", "ntk", "linear", "llama3")
    found = [method for method in methods if not method_refusal(positions, method, engines)]
    if len(found) < 2:
        return f"take {found[0]}" if found else ""
    return f"take {', '.join(found[:-1])} or {found[-1]}"
