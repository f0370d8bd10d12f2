"""What factors cost a model on long documents: past the original length, and within it.

Legend: T tokens of a document, A those that are scored, N documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.base import Source
from compressor.errors import CheckpointError
from compressor.progress import Progress
from compressor.rope.search_spec import STRETCHES, SearchSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a candidate scores whose logits are not finite: worse than any, and JSON.
_BROKEN = 1e6


@dataclass(frozen=True)
class Score:
    """Nats a token, a value for each document.

    Attributes:
        long_N: of what is searched for.
        short_N: of the tokens within the original length.
    """

    long_N: tuple[float, ...]
    short_N: tuple[float, ...]

    @property
    def long(self) -> float:
        """Mean over documents."""
        return sum(self.long_N) / len(self.long_N)

    @property
    def short(self) -> float:
        """Mean over documents."""
        return sum(self.short_N) / len(self.short_N)


@dataclass(frozen=True, eq=False)
class ScoredText:
    """A document and what of it counts.

    Attributes:
        ids_T: its tokens.
        long_A: indices of the tokens that are searched for.
        short: stretches of it of the original length, each read by itself.
    """

    ids_T: torch.Tensor
    long_A: torch.Tensor
    short: tuple[torch.Tensor, ...]


class Scorer:
    """Scores configs that differ in positions on one model, which is loaded for the first of them.

    Args:
        source: the checkpoint, not scaled.
        progress: told the device.
    """

    def __init__(self, source: Source, progress: Progress) -> None:
        self._source = source
        self._progress = progress
        self._model: PreTrainedModel | None = None
        self._plain = False

    def score(self, config: Mapping[str, Any], texts: Sequence[ScoredText]) -> Score:
        """Scores ``config``, one pass over each text.

        Raises:
            CheckpointError: the model cannot be loaded, or its positions not be changed.
        """
        import torch

        from compressor.evals.long_text import token_nll
        from compressor.model.quiet import quiet
        from compressor.model.rotary import positions_of

        model = self._loaded(texts[0].ids_T)
        long_N, short_N = [], []
        with quiet(), positions_of(model, config, self._source.label):
            for text in texts:
                nll_T = token_nll(model, text.ids_T, plain=self._plain)
                # Token t is foretold at index t - 1.
                long_N.append(_mean(nll_T[text.long_A - 1]))
                short = [token_nll(model, short_T, plain=self._plain) for short_T in text.short]
                short_N.append(_mean(torch.cat(short)))
        return Score(tuple(long_N), tuple(short_N))

    def _loaded(self, ids_T: torch.Tensor) -> PreTrainedModel:
        import torch

        from compressor.device import device_name, pick_device
        from compressor.evals.head import plain_head
        from compressor.model.load import load_source_model

        if self._model is None:
            device = pick_device()
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            model = load_source_model(self._source, dtype).to(device).eval()
            self._plain = plain_head(model, ids_T)
            if not self._plain:
                self._progress.warn(
                    "context.search: this model's logits are no plain projection of its last hidden state: "
                    "all of it runs anew for every few positions, which takes long"
                )
            self._progress.log(f"context.search: scored in {str(dtype)[6:]} on {device_name()}")
            self._model = model
        return self._model


def _mean(values: torch.Tensor) -> float:
    mean = values.double().mean()
    return float(mean) if bool(mean.isfinite()) else _BROKEN


def past_texts(
    documents: Sequence[torch.Tensor], first: int | None, original_length: int
) -> tuple[ScoredText, ...]:
    """Documents of which all tokens past the original length count; ``first`` begins each, if anything."""
    import torch

    return tuple(
        ScoredText(
            ids_T,
            torch.arange(original_length, len(ids_T)),
            _stretches(ids_T, first, original_length),
        )
        for ids_T in documents
    )


def _stretches(ids_T: torch.Tensor, first: int | None, length: int) -> tuple[torch.Tensor, ...]:
    """``STRETCHES`` of ``length`` tokens evenly over the text, or as many as it has."""
    import torch

    ahead = 0 if first is None else 1
    body_T, wanted = ids_T[ahead:], length - ahead
    count = min(STRETCHES, len(body_T) // wanted)
    step = (len(body_T) - wanted) // max(1, count - 1)
    starts = range(0, count * step, step) if count > 1 else (0,)
    return tuple(torch.cat([ids_T[:ahead], body_T[start : start + wanted]]) for start in starts)


def needle_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[ScoredText], spec: SearchSpec
) -> tuple[ScoredText, ...]:
    """The same documents with numbers hidden in them, of which only these count.

    Raises:
        UserError: a document has no room for them.
    """
    from compressor.evals.hidden_numbers import hide_numbers

    made = []
    for number, plain in enumerate(texts):
        text = hide_numbers(tokenizer, plain.ids_T, count=spec.needles, seed=spec.seed + number)
        made.append(ScoredText(text.ids_T, text.answer_A, plain.short))
    return tuple(made)


def check_finite(score: Score, label: str) -> None:
    """Refuses a model whose logits are not finite even with YaRN.

    Raises:
        CheckpointError: they are not.
    """
    if max(*score.long_N, *score.short_N) >= _BROKEN:
        raise CheckpointError(
            "logits are NaN or infinite on the search's documents, by YaRN",
            where=label,
            fix="check the weights",
        )
