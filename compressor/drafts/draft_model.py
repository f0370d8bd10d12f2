"""A smaller model of the same vocabulary that proposes tokens.

Legend: B sequences, T tokens of the prompt, K proposed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compressor.drafts.base import Proposal
from compressor.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.model.reader import Reader

# Texts that tokenizers of one vocabulary may still cut differently: spaces, digits, case, scripts, code.
_PROBES = (
    "The quick brown fox doesn't jump over 1234567 lazy dogs.",
    "def f(x):\n\treturn  x**2   # squared\n\n\n",
    "Ünïcödé — 北京 Привет \U0001f600",
)


class DraftModel:
    """A whole model with a cache of its own.

    Args:
        model: in evaluation mode, on the target's device, in the dtype to compute in; ``check_vocabulary``
            says whether it goes with a target.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def begin(self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor], next_B: torch.Tensor) -> None:
        """See ``Drafter``."""
        from compressor.model.reader import Reader

        self._reader: Reader = Reader(self._model)
        self._reader.read(ids_BT, last_only=True)
        # The last tokens of each sequence, which the model has not read: one, or two.
        self._unread_BU = next_B[:, None]

    def propose(self, count: int, generator: torch.Generator | None, temperature: float) -> Proposal:
        """See ``Drafter``; draws where the temperature is above 0."""
        import torch

        self._reader.mark()
        read_BU, ids, probs = self._unread_BU, [], []
        for _ in range(count):
            logits_BV = self._reader.read(read_BU, last_only=True).logits_BTV[:, -1]
            if temperature:
                probs.append((logits_BV / temperature).softmax(-1))
                ids.append(torch.multinomial(probs[-1], 1, generator=generator)[:, 0])
            else:
                ids.append(logits_BV.argmax(-1))
            read_BU = ids[-1][:, None]
        self._ids_BK = torch.stack(ids, dim=1)
        return Proposal(self._ids_BK, torch.stack(probs, dim=1) if probs else None)

    def keep(self, hidden: Mapping[int, torch.Tensor], kept_B: torch.Tensor, next_B: torch.Tensor) -> None:
        """See ``Drafter``."""
        import torch

        count = self._ids_BK.shape[1]
        # Of the proposal all tokens but the last have been read.
        extra_B = count - 1 - kept_B.cpu()
        if bool((extra_B < 0).any()):
            # Where all stay, the last is read next time, before the new one: so is each sequence's last.
            extra_B = extra_B + 1
            before_BP = torch.cat([self._unread_BU[:, -1:], self._ids_BK], dim=1)
            self._unread_BU = torch.stack([before_BP.gather(1, kept_B[:, None])[:, 0], next_B], dim=1)
        else:
            self._unread_BU = next_B[:, None]
        self._reader.unread(extra_B)

    def select(self, rows_R: torch.Tensor) -> None:
        """See ``Drafter``."""
        self._reader.select(rows_R)
        self._unread_BU = self._unread_BU[rows_R]


def check_vocabulary(
    target: PreTrainedTokenizerBase,
    draft: PreTrainedTokenizerBase,
    target_words: int,
    draft_words: int,
    where: str = "",
) -> None:
    """Refuses a draft model whose tokens are not the target's.

    Sizes must be equal too, with the rows that no token has: vLLM 0.32 asks for it (config/speculative.py,
    verify_equal_vocab_size_if_draft_model).

    Args:
        target: its tokenizer.
        draft: the draft model's.
        target_words: ``vocab_size`` of the target's config.
        draft_words: of the draft model's.
        where: what errors call the draft model.

    Raises:
        CheckpointError: with the first difference.
    """
    fix = "name a smaller model of the same family and generation"
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours != theirs:
        differing = sorted(
            token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
        )
        token = differing[0]
        raise CheckpointError(
            f"the draft model's tokenizer differs from the target's in {len(differing)} tokens, the first is "
            f"{token!r}: number {theirs.get(token)} against {ours.get(token)}",
            where=where,
            fix=fix,
        )
    for text in _PROBES:
        if draft.encode(text, add_special_tokens=False) != target.encode(text, add_special_tokens=False):
            raise CheckpointError(
                f"the draft model's tokenizer has the target's tokens but cuts {text!r} differently",
                where=where,
                fix=fix,
            )
    if target_words != draft_words:
        raise CheckpointError(
            f"the draft model's vocabulary has {draft_words} rows and the target's {target_words}: vLLM "
            "refuses the pair",
            where=where,
            fix=fix,
        )
