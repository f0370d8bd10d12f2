"""Numbers hidden in long texts and asked for at their end, by length and depth.

- ``passkey``: the wording of Mohtashami and Jaggi (2305.16300, appendix), whose filler is five short
  sentences over and over.
- ``needle``: a secret number of a place in a real text (``kv_needle``).

A number counts as found where every token of the answer is the likeliest after the tokens before it. That is
asked in one forward pass with the answer at its end (teacher forcing), and is the same as that greedy
decoding begins with the answer: as long as its tokens are right, both read the same text.

Legend: T tokens of a text, P tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from compressor.evals.head import logits_at, plain_head
from compressor.evals.kv_needle import SECRET, Needle, Wording, hide_needles
from compressor.evals.long_record import FoundCell
from compressor.evals.long_text import check_positions
from compressor.model.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.progress import Progress

Kind = Literal["passkey", "needle"]
KINDS: tuple[Kind, ...] = ("passkey", "needle")

_PASSKEY = Wording(
    opening="There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I "
    "will quiz you about the important information there.\n",
    needle="\nThe pass key is {number}. Remember it. {number} is the pass key.\n",
    question="\nWhat is the pass key? The pass key is",
    numbers=(1, 50_000),
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "

# Where each answer's log-probability and whether it is found come from: (index, what computes it).
Kept = Callable[[int, Callable[[], tuple[float, bool]]], tuple[float, bool]]


def hide(
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    text_T: torch.Tensor | None,
    *,
    tokens: int,
    depths: Sequence[float],
    trials: int,
    first: int | None,
    seed: int = 0,
) -> list[Needle]:
    """Texts of exactly ``tokens`` tokens, ``trials`` for each depth, with different numbers.

    Args:
        tokenizer: of the model.
        kind: ``passkey`` or ``needle``.
        text_T: ids of the text around needles; passkeys need none.
        tokens: length of each text, question and answer included.
        depths: 0 for the beginning to 1 for right before the question.
        trials: texts of a depth.
        first: a token before every text (``<bos>``), or None.
        seed: of numbers and of where the filler begins.

    Raises:
        UserError: the length has no room for the number and its question.
    """
    if kind == "needle":
        assert text_T is not None
        filler_T, wording = text_T, SECRET
    else:
        filler_T, wording = _repeated(tokenizer), _PASSKEY
    return hide_needles(
        tokenizer,
        filler_T,
        tokens=tokens,
        depths=depths,
        trials=trials,
        first=first,
        seed=seed,
        wording=wording,
    )


@quiet()
def find(
    model: PreTrainedModel,
    kind: Kind,
    needles: Sequence[Needle],
    *,
    progress: Progress,
    label: str = "model",
    kept: Kept | None = None,
) -> tuple[FoundCell, ...]:
    """How many numbers the model finds, by length and depth in the order of ``needles``.

    Args:
        model: in evaluation mode, on its device, in the dtype to compute in.
        kind: of the needles, for the record.
        needles: of ``hide``.
        progress: told the tokens read.
        label: for progress.
        kept: given a needle's number and what computes its answer, gives the answer: what resumes.

    Raises:
        UserError: the model has learned positions and too few of them.
    """
    check_positions(model, max(len(needle.ids_T) for needle in needles))
    plain = plain_head(model, needles[0].ids_T)
    progress.start(f"long {kind} ({label})", sum(len(needle.ids_T) for needle in needles), "tokens")
    answers: dict[tuple[int, float], list[tuple[float, bool]]] = {}
    for number, needle in enumerate(needles):

        def compute(needle: Needle = needle) -> tuple[float, bool]:
            return _answer(model, needle, plain)

        answer = compute() if kept is None else kept(number, compute)
        answers.setdefault((len(needle.ids_T), needle.depth), []).append(answer)
        progress.advance(len(needle.ids_T), f"{len(needle.ids_T):,} tokens, depth {needle.depth:g}")
    progress.finish()
    return tuple(
        FoundCell(
            kind=kind,
            tokens=tokens,
            depth=depth,
            trials=len(found),
            found=sum(right for _, right in found),
            logprob=sum(logprob for logprob, _ in found) / len(found),
            right=tuple(right for _, right in found),
        )
        for (tokens, depth), found in answers.items()
    )


def _repeated(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Ids of the filler; ``hide_needles`` begins it again where it ends."""
    import torch

    # Of several, so that what the first sentence is made of where it begins the text matters little.
    return torch.tensor(tokenizer.encode(_FILLER * 8, add_special_tokens=False, verbose=False))


def _answer(model: PreTrainedModel, needle: Needle, plain: bool) -> tuple[float, bool]:
    """Log-probability of the answer, and whether each of its tokens ranks first."""
    import torch

    length = len(needle.ids_T)
    positions_P = torch.arange(length - needle.answer - 1, length - 1)
    logprob_PV = logits_at(model, needle.ids_T, plain=plain)(positions_P).log_softmax(-1)
    target_P = needle.ids_T[positions_P + 1].to(logprob_PV.device)
    logprob = float(logprob_PV.gather(1, target_P[:, None]).double().sum())
    return logprob, bool((logprob_PV.argmax(-1) == target_P).all())
