"""KV-cache formats by name, measured on one model: where ``kv`` and ``evals`` meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import CheckpointError, UserError
from compressor.evals.base import EvalResult, EvalSpec
from compressor.evals.kv_feed import KvVariant, Mode
from compressor.kv.formats import FORMATS
from compressor.kv.plan import JSON_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from compressor.kv.layer import LayerCodecs
    from compressor.progress import Progress

PLAN = "plan"

# vLLM 0.32 leaves the first chunk raw for these only; its other backends store first and read the cache
# (v1/attention/backends/turboquant_attn.py, triton_attn.py).
_RAW_PROMPTS = "turboquant_"


def check_kv_formats(names: Sequence[str], checkpoint: Path) -> None:
    """Refuses names that are no formats, and a plan that the checkpoint lacks; needs no model.

    Raises:
        UserError: naming the format and the known ones; the same name twice.
        CheckpointError: there is no ``kv_plan.json``.
    """
    for name in names:
        if name == PLAN:
            if not (checkpoint / JSON_NAME).is_file():
                raise CheckpointError(
                    f"there is no {JSON_NAME}", where=str(checkpoint), fix="name formats instead of `plan`"
                )
            continue
        try:
            FORMATS.find(name)
        except ValueError as error:
            raise UserError(f"{error}; `{PLAN}` is the checkpoint's own {JSON_NAME}") from error
    if len(set(names)) < len(names):
        raise UserError("a KV-cache format is named twice", fix="name each once")


def kv_variants(
    config: PreTrainedConfig, names: Sequence[str], mode: Mode, checkpoint: Path, progress: Progress
) -> list[KvVariant]:
    """What ``with_kv`` measures: each format in all layers that vLLM would store so, or the plan.

    In mode ``vllm``, formats that vLLM reads from its cache even within a prompt are read so here too; a
    plan is read as TurboQuant is.

    Raises:
        UserError: a format that this model cannot have.
        CheckpointError: multi-head latent attention; a broken plan, or one of another model.
    """
    from compressor.kv.cache import PackedCache, uniform_layers

    made = []
    for name in names:
        layers = _planned(config, checkpoint) if name == PLAN else uniform_layers(config, FORMATS.find(name))
        if not layers:
            why = (
                "it lists no layer"
                if name == PLAN
                else "vLLM keeps every layer of so small a model in 16 bit"
            )
            progress.warn(f"{name} stores nothing: {why}")
        reads: Mode = mode if name == PLAN or _leaves_prompts_raw(name) else "strict"

        def make(layers: dict[int, LayerCodecs] = layers, reads: Mode = reads) -> PackedCache:
            return PackedCache.of(config, layers, reads)

        make()  # what the cache cannot hold is refused before the first token
        recent = max((codecs.recent_tokens for codecs in layers.values()), default=0)
        made.append(KvVariant(name, make, recent))
    return made


def plan_modes(checkpoint: Path) -> tuple[Mode, ...]:
    """The modes that tell apart how a checkpoint's own plan is read; none without a plan, or one of 16 bit.

    Raises:
        CheckpointError: a broken plan.
    """
    from compressor.kv.plan import KvPlan

    if not (checkpoint / JSON_NAME).is_file():
        return ()
    plan = KvPlan.read(checkpoint)
    packed = [plan.layers[index].format for index in plan.codecs()]
    if not packed:
        return ()
    return ("strict", "vllm") if all(map(_leaves_prompts_raw, packed)) else ("strict",)


def _leaves_prompts_raw(name: str) -> bool:
    """Whether vLLM serves the format and reads a prompt's first chunk unquantized."""
    return name.startswith(_RAW_PROMPTS) and name in FORMATS and FORMATS[name].tier == "vllm"


def _planned(config: PreTrainedConfig, checkpoint: Path) -> dict[int, LayerCodecs]:
    """The layers of the checkpoint's own plan, which must be those of its model."""
    from compressor.kv.cache import full_attention_layers, head_sizes
    from compressor.kv.plan import KvPlan

    plan = KvPlan.read(checkpoint)
    known, (heads, head_dim) = full_attention_layers(config), head_sizes(config)
    for number, layer in plan.layers.items():
        if (
            number not in known
            or heads not in (None, layer.kv_heads)
            or head_dim not in (None, layer.head_dim)
        ):
            raise CheckpointError(
                f"layer {number} of the plan, {layer.kv_heads} KV heads of {layer.head_dim}, is none of this "
                "model",
                where=str(checkpoint / JSON_NAME),
                fix="make the plan again, from this checkpoint's source",
            )
    return plan.codecs()


def with_kv(
    measured: EvalResult,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    variants: Sequence[KvVariant],
    spec: EvalSpec,
    progress: Progress,
    *,
    mode: Mode = "strict",
    needle: Sequence[int] = (),
) -> EvalResult:
    """``measured`` with each variant against the same model with a 16-bit cache, on the text of ``spec``.

    Args:
        measured: of the model without a quantized cache.
        model: in evaluation mode, where it is to compute.
        tokenizer: of the model.
        variants: of ``kv_variants``; without any, nothing is added.
        spec: the text, its tokens and windows, and the seed.
        progress: told the tokens done.
        mode: what ``variants`` were made for.
        needle: lengths of texts to hide needles in.

    Raises:
        UserError: windows or needles that the model has no positions for.
        CheckpointError: logits are NaN or infinite.
    """
    if not variants:
        return measured
    from compressor.evals.kv import KvSpec, evaluate_kv
    from compressor.evals.text import tokens_from_text
    from compressor.kv.cache import PackedCache

    def usual() -> PackedCache:
        return PackedCache.of(model.config, {})

    ids_T = tokens_from_text(tokenizer, spec.text, spec.tokens)
    asked = KvSpec(context=spec.context, mode=mode, needle_tokens=tuple(needle), seed=spec.seed)
    return replace(measured, kv=tuple(evaluate_kv(model, tokenizer, ids_T, variants, usual, asked, progress)))
