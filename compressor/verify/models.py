"""The checkpoint and its source as transformers computes them: the reference that an engine must meet."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from math import isfinite, log1p
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.checkpoint.base import Source
from compressor.checkpoint.stored import StoredTensors
from compressor.device import available_memory_bytes, collect_memory
from compressor.errors import CheckpointError
from compressor.progress import Progress
from compressor.report.model import load_report
from compressor.spec import DTYPE_BYTES
from compressor.verify.base import Check
from compressor.verify.inputs import Tokens, tokens_of
from compressor.verify.judge import Logprobs, distance
from compressor.verify.spec import VerifySpec
from compressor.verify.structure.side_files import has_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compressor.model.load import LoadedCheckpoint

NEW_TOKENS = 16
# Parameters in float32; copies of them in 16 bit; the packed weights that one element holds, at 4 bits each.
_FLOAT32_BYTES = 4
_16_BIT_BYTES = 2
_PACKED = {"U8": 2, "I32": 8}
_ROOM_BYTES = 2 << 30
# A loss may exceed the report's by this much on another text: its own growth again twice over, or 0.1 nats.
_GROWTH = 3.0
_SLACK_NATS = 0.1
# Of a perplexity: no less can be told of it as a logarithm.
_LEAST_INCREASE = -0.999


@dataclass(frozen=True)
class Reference:
    """What transformers computed in float32.

    Attributes:
        check: whether the checkpoint could be loaded and is finite; all else is meaningless unless it passed.
        tokens: what was scored and continued, or None.
        checkpoint: log-probabilities by the checkpoint with its weights decoded.
        rounded: the same with activations rounded as the scheme says, or None where it leaves them alone or
            they cannot be simulated.
        rounded_noise: mean distance between ``rounded`` and the same computed in 16 bit: rounding turns the
            least difference into another code, so that two right programs are this far apart.
        unsimulated: whether the scheme rounds activations and ``rounded`` could not be made.
        source: log-probabilities by the source, or None.
        greedy: the checkpoint's greedy continuations.
    """

    check: Check
    tokens: Tokens | None = None
    checkpoint: Logprobs = ()
    rounded: Logprobs | None = None
    rounded_noise: float = 0.0
    unsimulated: bool = False
    source: Logprobs | None = None
    greedy: tuple[tuple[int, ...], ...] = ()


def load_reference(spec: VerifySpec, source: Source | None, progress: Progress) -> Reference:
    """Loads the checkpoint, then the source, one after the other, and scores the same tokens with both.

    Raises:
        UserError: the text cannot be used, or the source cannot be loaded.
    """
    import torch

    from compressor.model.decode import fused_tensors
    from compressor.model.load import load_checkpoint_model, load_source_model
    from compressor.verify.reference import greedy_tokens, prompt_logprobs

    needed, available = _memory_needed(spec.checkpoint, source), available_memory_bytes()
    if needed > available:
        short = f"loading takes about {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are free"
        return Reference(Check("transformers", "skipped", short))
    progress.log("loading the checkpoint with transformers")
    try:
        tokenizer = _tokenizer(spec.checkpoint, source)
        if tokenizer is None:
            return Reference(
                Check("transformers", "skipped", "neither checkpoint nor source has a tokenizer")
            )
        loaded = load_checkpoint_model(spec.checkpoint, torch.float32, fused=fused_tensors(source))
    except CheckpointError as error:
        return Reference(Check("transformers", "failed", error.what))
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    try:
        tokens = tokens_of(tokenizer, spec.text, spec.tokens, longest)
    except CheckpointError as error:
        return Reference(Check("transformers", "failed", error.what))
    largest, rows = tokens.largest, loaded.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        text = f"the tokenizer makes id {largest:,}, but the embedding has {rows:,} rows"
        return Reference(Check("transformers", "failed", text))
    rounded, noise = _rounded(loaded, tokens) if loaded.activations_simulated else (None, 0.0)
    scored = prompt_logprobs(loaded.model, tokens.windows)
    if not all(isfinite(value) for window in scored for value in window):
        return Reference(Check("transformers", "failed", "it computes NaN or infinite log-probabilities"))
    greedy = greedy_tokens(loaded.model, tokens.prompts, NEW_TOKENS)
    unsimulated = loaded.activations_simulated is False
    how = "its own loader" if loaded.via == "transformers" else "its weights decoded first"
    del loaded
    collect_memory()
    of_source = None
    if source is not None:
        progress.log("loading the source with transformers")
        of_source = prompt_logprobs(load_source_model(source, torch.float32), tokens.windows)
        gc.collect()
    passed = Check("transformers", "passed", f"loads with {how}; {tokens.scored} tokens scored in float32")
    return Reference(passed, tokens, scored, rounded, noise, unsimulated, of_source, greedy)


def _tokenizer(checkpoint: Path, source: Source | None) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; where it has no vocabulary, the source's, or None."""
    from compressor.model.load import load_tokenizer

    if has_vocabulary(os.listdir(checkpoint)):
        return load_tokenizer(checkpoint)
    if source is None:
        return None
    try:
        return load_tokenizer(source)
    except CheckpointError:
        return None


def _rounded(loaded: LoadedCheckpoint, tokens: Tokens) -> tuple[Logprobs, float]:
    """``Reference.rounded`` and ``rounded_noise``; leaves the model in float32 with unrounded activations."""
    import torch
    from compressed_tensors.quantization import disable_quantization

    from compressor.model.load import set_dtype
    from compressor.verify.reference import prompt_logprobs

    rounded = prompt_logprobs(loaded.model, tokens.windows)
    weights = {name: parameter.data for name, parameter in loaded.model.named_parameters()}
    in_16_bit = prompt_logprobs(set_dtype(loaded.model, torch.bfloat16), tokens.windows)
    for name, parameter in loaded.model.named_parameters():
        parameter.data = weights[name]
    set_dtype(loaded.model, torch.float32).apply(disable_quantization)
    return rounded, distance(rounded, in_16_bit).mean


def check_quality(checkpoint: Path, reference: Reference) -> list[Check]:
    """``loss``: what the checkpoint loses on the tokens, against what its own report says it loses."""
    if reference.source is None:
        return [Check("loss", "skipped", "there is no source to compare with")]
    growth = _mean_loss(reference.checkpoint) - _mean_loss(reference.source)
    try:
        report = load_report(checkpoint)
    except CheckpointError:  # a checkpoint of another program, or a report that is a link
        report = None
    quality = None if report is None else report.quality
    if report is None or quality is None:
        text = f"{growth:+.4f} nats a token against the source; no report says what to expect"
        return [Check("loss", "skipped", text)]
    if not quality.perplexity.increase > -1.0:
        return [
            Check("loss", "failed", "the report says that perplexity fell to nothing, which is impossible")
        ]
    reported = log1p(quality.perplexity.increase)
    if report.context is not None and report.context.cost is not None:
        # Here the source's positions are scaled like the result's (``verify.scaled``), there they were not.
        reported -= log1p(max(report.context.cost.increase, _LEAST_INCREASE))
    allowed = max(_GROWTH * reported, reported + _SLACK_NATS)
    text = f"{growth:+.4f} nats a token against the source; the report says {reported:+.4f} on its text"
    return [Check("loss", "passed" if growth <= allowed else "failed", text)]


def check_source_values(checkpoint: Path, source: Source, progress: Progress) -> list[Check]:
    """The checks of ``verify.values``; ``copies`` alone where no quantization is read."""
    from compressor.model.decode import StoredWeights
    from compressor.verify.chosen import chosen_with_data
    from compressor.verify.values import check_copies, check_values

    try:
        stored = StoredWeights(checkpoint)
    except CheckpointError as error:
        copies = check_copies(StoredTensors(checkpoint), source, progress)
        return [Check("weights", "skipped", error.what), copies]
    return check_values(stored, source, progress, chosen_with_data(checkpoint))


def _mean_loss(logprobs: Logprobs) -> float:
    values = [value for window in logprobs for value in window]
    return -sum(values) / len(values)


def _memory_needed(checkpoint: Path, source: Source | None) -> int:
    """Bytes that ``load_reference`` takes at its most: ``max(B * M, S * N)`` and 2 GiB for all else.

    The checkpoint and its source are loaded one after the other, and the memory of the first is returned.

    M: parameters of the checkpoint, from stored elements, scales included; a U8 counts as two and an I32 as
    eight, their number at 4 bits.
    B: 4 for the model in float32; 6 where activations are rounded, whose noise is measured with a copy in 16
    bit; 8 where experts are decoded one by one: all decoded tensors, and the model that transformers merges
    them into.
    N: parameters of the source. S: 4, and 2 more for the tensors of a dequantized source (GGUF, or
    ``model.from``) that are given to transformers. N is 0 without a source.
    """
    from compressor.checkpoint.inventory import take_inventory

    kinds = take_inventory(checkpoint).kinds
    stored = sum(kind.bytes // DTYPE_BYTES[kind.dtype] * _PACKED.get(kind.dtype, 1) for kind in kinds)
    needed = _bytes_per_weight(checkpoint) * stored
    if source is not None:
        per_weight = _FLOAT32_BYTES + (0 if source.kind == "safetensors" else _16_BIT_BYTES)
        needed = max(needed, per_weight * sum(header.numel for header in source.headers.values()))
    return needed + _ROOM_BYTES


def _bytes_per_weight(checkpoint: Path) -> int:
    """``B`` of ``_memory_needed``, by the way in which ``load_checkpoint_model`` will go."""
    from compressor.model.decode import StoredWeights
    from compressor.model.load import EXPERT

    try:
        weights = StoredWeights(checkpoint)
        if any(EXPERT.search(module) for module in weights.modules):
            return 2 * _FLOAT32_BYTES
        if any(weights.scheme(module).input_activations for module in weights.modules):
            return _FLOAT32_BYTES + _16_BIT_BYTES
    except CheckpointError:  # not quantized, or loading will say what is wrong
        pass
    return _FLOAT32_BYTES
