"""Decoding of source and result with transformers against the clock, on the device at hand.

Legend: B sequences, T tokens of a prompt, L tokens of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from compressor.device import device_bytes, device_name, peak_device_bytes, reset_peak, synchronize
from compressor.errors import UserError
from compressor.evals.generation import evenly
from compressor.model.quiet import quiet
from compressor.model.reach import reach

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compressor.evals.base import SpeedSpec
    from compressor.progress import Progress


@dataclass(frozen=True)
class Turn:
    """One model generating once: seconds to the first token, tokens a second after it, bytes of the cache."""

    first_token_s: float
    tokens_per_s: float
    cache_bytes: int
    extra_device_bytes: int


@dataclass(frozen=True)
class SpeedFigures:
    """One model over several turns.

    Attributes:
        turns: in their order.
        weight_bytes: of parameters and buffers as they are in memory, shared ones once.
        on_accelerator: whether the device's memory was measured too.
    """

    turns: tuple[Turn, ...]
    weight_bytes: int
    on_accelerator: bool

    def to_json(self) -> dict[str, Any]:
        """JSON-able: medians with the lowest and the highest, and bytes."""
        peak = self.weight_bytes + max(turn.extra_device_bytes for turn in self.turns)
        return {
            "first_token_s": _spread([turn.first_token_s for turn in self.turns]),
            "tokens_per_s": _spread([turn.tokens_per_s for turn in self.turns]),
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.turns[-1].cache_bytes,
            "peak_device_bytes": peak if self.on_accelerator else None,
        }


@dataclass(frozen=True)
class SpeedResult:
    """Source and result by turns.

    Attributes:
        spec: what was timed.
        source: the source's turns.
        result: the result's.
        dtype: that both computed in.
        device: its name.
        runs_compressed: whether the result's weights stayed compressed.
    """

    spec: SpeedSpec
    source: SpeedFigures
    result: SpeedFigures
    dtype: str
    device: str
    runs_compressed: bool

    def to_json(self) -> dict[str, Any]:
        """JSON-able: how it was measured, ``source``, ``result`` and ``speedup``, turn against turn."""
        pairs = zip(self.source.turns, self.result.turns, strict=True)
        return {
            **vars(self.spec),
            "source": self.source.to_json(),
            "result": self.result.to_json(),
            "speedup": _spread([after.tokens_per_s / before.tokens_per_s for before, after in pairs]),
            "dtype": self.dtype,
            "device": self.device,
            "runs_compressed": self.runs_compressed,
        }


@quiet()
def compare_speed(
    source_model: PreTrainedModel,
    result_model: PreTrainedModel,
    ids_L: torch.Tensor,
    spec: SpeedSpec,
    progress: Progress,
) -> SpeedResult:
    """Times greedy decoding of the same prompts, source and result by turns, after a turn of each unmeasured.

    By turns, so that what else the machine does falls on both alike.

    Args:
        source_model: in evaluation mode, on its device, in the dtype to compute in.
        result_model: the same.
        ids_L: of a text that prompts are taken from.
        spec: what to time.
        progress: told the turns.

    Raises:
        UserError: the text is shorter than the prompts, or both together longer than a model reads.
    """
    import torch

    _check(source_model, result_model, len(ids_L), spec)
    prompts = evenly(ids_L, spec.batch, spec.prompt_tokens, None)
    prompts += prompts[:1] * (spec.batch - len(prompts))
    ids_BT = torch.stack(prompts)
    models = (source_model, result_model)
    turns: tuple[list[Turn], list[Turn]] = ([], [])
    progress.start("speed", 2 * (1 + spec.runs), "items")
    for run in range(1 + spec.runs):
        for model, kept in zip(models, turns, strict=True):
            turn = _turn(model, ids_BT, spec.new_tokens)
            # The first of each warms up.
            kept += [turn] if run else []
            progress.advance(1)
    progress.finish()
    on_accelerator = source_model.device.type != "cpu"
    source, result = (
        SpeedFigures(tuple(kept), weight_bytes(model), on_accelerator)
        for model, kept in zip(models, turns, strict=True)
    )
    return SpeedResult(
        spec=spec,
        source=source,
        result=result,
        dtype=str(source_model.dtype).removeprefix("torch."),
        device=device_name(),
        # What transformers decodes while it loads, it holds in the source's size.
        runs_compressed=result.weight_bytes < 0.9 * source.weight_bytes,
    )


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers in memory, those that share storage once."""
    held = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def _turn(model: PreTrainedModel, ids_BT: torch.Tensor, new_tokens: int) -> Turn:
    import torch

    from compressor.model.reader import Reader

    ids_BT = ids_BT.to(model.device)
    reset_peak()
    before = device_bytes()
    reader = Reader(model)
    with torch.inference_mode():
        synchronize(model.device)
        start = perf_counter()
        next_B = reader.read(ids_BT, last_only=True).logits_BTV[:, -1].argmax(-1)
        synchronize(model.device)
        first = perf_counter()
        for _ in range(new_tokens - 1):
            next_B = reader.read(next_B[:, None]).logits_BTV[:, -1].argmax(-1)
        synchronize(model.device)
        end = perf_counter()
    return Turn(
        first_token_s=first - start,
        tokens_per_s=len(ids_BT) * (new_tokens - 1) / (end - first),
        cache_bytes=reader.cache_bytes,
        extra_device_bytes=max(0, peak_device_bytes() - before),
    )


def _check(source: PreTrainedModel, result: PreTrainedModel, tokens: int, spec: SpeedSpec) -> None:
    if tokens < spec.prompt_tokens:
        raise UserError(
            f"speed: the text has {tokens} tokens, and a prompt {spec.prompt_tokens}",
            fix="read more tokens of the text, or ask for shorter prompts",
        )
    length = spec.prompt_tokens + spec.new_tokens
    for model in (source, result):
        longest = reach(model.config.get_text_config().to_dict())
        if longest is not None and length > longest:
            raise UserError(f"speed: prompt and continuation are {length} tokens; a model reads {longest}")


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}
