"""What proposes tokens for a target to verify, as the decoding loop sees it.

The loop (``evals/decode.py``) reads a prompt with the target, then repeats: the drafter proposes up to K
tokens, the target reads them in one pass and keeps a first part of them and one token of its own. And what is
trained to do so (``Head``), as the trainer sees it (``stages/drafts_train.py``).

Legend: B sequences, T tokens of the prompt, K proposed, D hidden size, V vocabulary of the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# Key of the hidden states that enter the target's head, behind the last norm; other keys n are those of
# transformers' ``hidden_states[n]``: what enters decoder layer n.
LAST = -1


@dataclass(frozen=True, eq=False)
class Proposal:
    """Tokens ahead.

    Attributes:
        ids_BK: proposed tokens.
        probs_BKV: the distribution that each was drawn from, over the target's vocabulary, in fp32; None
            where the likeliest was taken.
    """

    ids_BK: torch.Tensor
    probs_BKV: torch.Tensor | None = None


class Drafter(Protocol):
    """Proposes tokens for B sequences at once; keeps what it needs of their past.

    ``begin`` once, then ``propose`` and ``keep`` by turns, ``select`` between them; ``begin`` again for
    others.

    Attributes:
        layers: hidden states of the target that it reads (``LAST`` or n); empty for none.
    """

    @property
    def layers(self) -> tuple[int, ...]:
        """See above."""
        ...

    def begin(self, ids_BT: torch.Tensor, hidden: Mapping[int, torch.Tensor], next_B: torch.Tensor) -> None:
        """New sequences of equal length.

        Args:
            ids_BT: the prompts.
            hidden: their hidden states [B, T, D] by layer.
            next_B: the first new token of each.
        """
        ...

    def propose(self, count: int, generator: torch.Generator | None, temperature: float) -> Proposal:
        """``count`` tokens after the last kept one; temperature 0 for the likeliest."""
        ...

    def keep(self, hidden: Mapping[int, torch.Tensor], kept_B: torch.Tensor, next_B: torch.Tensor) -> None:
        """The target read the last token and the proposal.

        Args:
            hidden: [B, 1 + K, D] by layer, of the last kept token and the proposed ones.
            kept_B: how many proposed tokens of each sequence stay (0 to K).
            next_B: the target's own token after these.
        """
        ...

    def select(self, rows_R: torch.Tensor) -> None:
        """Goes on with these sequences only, in this order: the others are finished."""
        ...


@dataclass(frozen=True, eq=False)
class Rows:
    """What a frozen target read and computed, for a head to be trained on.

    Attributes:
        ids_BT: tokens, int64.
        hidden: its hidden states [B, T, D] by layer: those of ``Head.layers``, and ``LAST``, from which the
            target's own logits are made.
        counted_BT: bool; whether a token may be a place to propose from (position t of slot 0 reads hidden t
            and token t + 1); False behind an end of text.
    """

    ids_BT: torch.Tensor
    hidden: Mapping[int, torch.Tensor]
    counted_BT: torch.Tensor


@dataclass(frozen=True, eq=False)
class Unrolled:
    """Sums over the places of some rows, so that batches and processes can be put together.

    Attributes:
        loss: fp32 scalar to be differentiated: the steps' losses, weighted by how far ahead they are.
        losses_K: fp32, detached: each step's, not weighted, nats.
        accepted_K: places where the likeliest tokens of steps 0 to k are all the target's own likeliest ones.
        places: how many places were counted; of each step the same.
    """

    loss: torch.Tensor
    losses_K: torch.Tensor
    accepted_K: torch.Tensor
    places: int


class Head(Protocol):
    """A draft head that can be trained; it knows its target's embedding and head, which stay frozen."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads (``LAST`` or n)."""
        ...

    @property
    def trained(self) -> Mapping[str, torch.nn.Parameter]:
        """Name -> every trained parameter, fp32, on the target's device; always in the same order."""
        ...

    def unroll(self, rows: Rows, steps: int) -> Unrolled:
        """Proposes ``steps`` tokens from every place at once, each step on what the one before made."""
        ...

    def write(self, folder: Path, tokens: int) -> None:
        """Writes it for an engine that proposes ``tokens`` at a time.

        Args:
            folder: a copy of the whole checkpoint; it gets a folder ``draft`` or, where the head is part of
                the checkpoint, other files of weights. Files are replaced, never written to: they may be
                links.
            tokens: the engine's number of speculative tokens.
        """
        ...
