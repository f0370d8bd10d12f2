"""KV-cache formats by name, measured on one model: where ``kv`` and ``evals`` meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.errors import UserError
from compressor.evals.kv_feed import KvVariant, Mode
from compressor.kv.formats import FORMATS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from compressor.evals.kv import KvSpec
    from compressor.evals.kv_record import KvResult
    from compressor.kv.layer import LayerCodecs
    from compressor.progress import Progress

# vLLM 0.32 leaves the first chunk raw for these only; its other backends store first and read the cache
# (v1/attention/backends/turboquant_attn.py, triton_attn.py).
_RAW_PROMPTS = "turboquant_"


def check_kv_formats(names: Sequence[str]) -> None:
    """Refuses names that are no formats; needs no model.

    Raises:
        UserError: naming the format and the known ones; the same name twice.
    """
    for name in names:
        try:
            FORMATS.find(name)
        except ValueError as error:
            raise UserError(str(error)) from error
    if len(set(names)) < len(names):
        raise UserError("a KV-cache format is named twice", fix="name each once")


def kv_variants(
    config: PreTrainedConfig, names: Sequence[str], mode: Mode, progress: Progress
) -> list[KvVariant]:
    """What ``measure_kv`` measures: each format in all layers that vLLM would store so.

    In mode ``vllm``, formats that vLLM reads from its cache even within a prompt are read so here too.

    Raises:
        UserError: a format that this model cannot have.
        CheckpointError: multi-head latent attention.
    """
    from compressor.kv.cache import PackedCache, uniform_layers

    made = []
    for name in names:
        layers = uniform_layers(config, FORMATS.find(name))
        if not layers:
            progress.warn(f"{name} stores nothing: vLLM keeps every layer of so small a model in 16 bit")
        reads: Mode = mode if name.startswith(_RAW_PROMPTS) else "strict"

        def make(layers: dict[int, LayerCodecs] = layers, reads: Mode = reads) -> PackedCache:
            return PackedCache.of(config, layers, reads)

        make()  # what the cache cannot hold is refused before the first token
        recent = max((codecs.recent_tokens for codecs in layers.values()), default=0)
        made.append(KvVariant(name, make, recent))
    return made


def measure_kv(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids_T: torch.Tensor,
    variants: Sequence[KvVariant],
    spec: KvSpec,
    progress: Progress,
) -> tuple[KvResult, ...]:
    """Each variant against the same model with a 16-bit cache; errors as ``evaluate_kv``."""
    from compressor.evals.kv import evaluate_kv
    from compressor.kv.cache import PackedCache

    def usual() -> PackedCache:
        return PackedCache.of(model.config, {})

    return tuple(evaluate_kv(model, tokenizer, ids_T, variants, usual, spec, progress))
