"""Negative log-likelihood of every token of long documents: read whole, and through a sliding window.

A document is one window: its token p is predicted from the p tokens before it. The sliding reference is what
a model can do that must not read further than it was trained: windows of its own length, ``stride`` tokens
apart, of which only the tokens that no window before has scored are. Each token beyond the first window is
so predicted from the ``window - stride`` to ``window - 1`` tokens before it; those in it as in the whole
document. Where the tokenizer puts a token before every text, every window begins with it.

Memory: hidden states of one document; logits of a few hundred tokens at a time. Attention is transformers'
``sdpa``, which builds no mask for one unpadded text (``masking_utils._ignore_causal_mask_sdpa`` of 5.17), but
in layers with a sliding window of their own.

Legend: N documents, T tokens of a document, P = T - 1 scored tokens, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import CheckpointError, UserError
from compressor.evals.head import logits_at, plain_head
from compressor.evals.text import first_tokens, read_documents, vocabulary_size
from compressor.model.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressor.progress import Progress

# Of float32 logits and their log-probabilities at once. A head that is not plain runs the model again for
# every chunk: then fewer, larger ones.
LOGIT_BYTES = 512 * 2**20
COSTLY_LOGIT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Documents:
    """Documents of the same length.

    Attributes:
        ids_NT: token ids, the leading token included where the tokenizer has one.
        names: each document's ``id`` in the file, or its line.
        first: the leading token, or None.
        skipped: documents of the file that are shorter.
    """

    ids_NT: torch.Tensor
    names: tuple[str, ...]
    first: int | None
    skipped: int


@dataclass(frozen=True)
class Sliding:
    """A sliding window: ``window`` tokens, moved on by ``stride``."""

    window: int
    stride: int

    def check(self) -> None:
        """Raises UserError unless every window scores something that it has read before."""
        if not 0 < self.stride < self.window:
            raise UserError(
                f"a window of {self.window} tokens cannot slide by {self.stride}",
                fix="use a stride below the window",
            )

    def forward_tokens(self, tokens: int) -> int:
        """Tokens that the windows over one document of ``tokens`` hold together."""
        if tokens <= self.window:
            return tokens
        return self.window * (1 - (self.window - tokens) // self.stride)


def long_documents(
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    documents: int,
    tokens: int,
    first: int | None,
    least: int | None = None,
) -> Documents:
    """The first ``documents`` documents of a file that have ``tokens`` tokens, cut there.

    Args:
        tokenizer: of the model.
        path: JSON lines with ``text`` and maybe ``id``, or one plain text; packed by xz or not.
        documents: how many.
        tokens: of each, ``first`` included.
        first: a token put before every document (``<bos>``), or None.
        least: fewer documents are enough down to this number; by default none are.

    Raises:
        UserError: unreadable, or fewer so long documents.
    """
    import torch

    ahead = [] if first is None else [first]
    rows: list[torch.Tensor] = []
    names, longest, read = [], 0, 0
    for name, text in read_documents(path):
        if len(rows) == documents:
            break
        read += 1
        ids = [*ahead, *first_tokens(tokenizer, text, tokens - len(ahead))]
        longest = max(longest, len(ids))
        if len(ids) == tokens:
            rows.append(torch.tensor(ids))
            names.append(name)
    if len(rows) < (documents if least is None else least):
        raise UserError(
            f"{len(rows)} of {read} documents have {tokens:,} tokens, {documents} are asked for; the longest "
            f"has {longest:,}" + (" or more" if longest == tokens else ""),
            where=str(path),
            fix="ask for fewer documents or tokens, or name longer ones",
        )
    return Documents(torch.stack(rows), tuple(names), first, read - len(rows))


@quiet()
def measure(
    model: PreTrainedModel,
    documents: Documents,
    *,
    sliding: Sliding | None = None,
    progress: Progress,
    label: str = "model",
    kept: Callable[[int, Callable[[], torch.Tensor]], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Negative log-likelihood in nats [N, P] in float32 of every token but the first, on the CPU.

    Read as ``model`` is at this moment: its rotary embeddings may be exchanged between calls
    (``compressor.model.rotary``), and no length is refused that they can compute.

    Args:
        model: in evaluation mode, on its device, in the dtype to compute in.
        documents: of ``long_documents``.
        sliding: read through this window; None for each document whole.
        progress: told the tokens that passed through the model.
        label: for progress and errors.
        kept: given a document's number and what computes its row, gives the row: what resumes.

    Raises:
        UserError: the window cannot slide, or the model has learned positions and too few of them.
        CheckpointError: the logits are NaN or infinite.
    """
    import torch

    count, tokens = documents.ids_NT.shape
    longest = tokens if sliding is None else min(tokens, sliding.window)
    check_positions(model, longest)
    if sliding is not None:
        sliding.check()
    plain = plain_head(model, documents.ids_NT[0])
    each = tokens if sliding is None else sliding.forward_tokens(tokens)
    progress.start(f"long text ({label})", count * each, "tokens")

    def row(ids_T: torch.Tensor) -> torch.Tensor:
        if sliding is None:
            return token_nll(model, ids_T, plain=plain)
        return sliding_nll(model, ids_T, sliding, first=documents.first, plain=plain)

    rows = []
    for number, ids_T in enumerate(documents.ids_NT):

        def compute(ids_T: torch.Tensor = ids_T) -> torch.Tensor:
            return row(ids_T)

        nll_P = compute() if kept is None else kept(number, compute)
        if not bool(torch.isfinite(nll_P).all()):
            raise CheckpointError(
                f"the {label}'s logits are NaN or infinite in {documents.names[number]}",
                fix="its weights or scales are broken, or it needs a wider dtype",
            )
        rows.append(nll_P)
        progress.advance(each, f"document {number + 1} of {count}")
    progress.finish()
    return torch.stack(rows)


def token_nll(model: PreTrainedModel, ids_T: torch.Tensor, *, plain: bool, scored: int = 0) -> torch.Tensor:
    """Negative log-likelihoods [T - 1] of one text in one forward pass, or of its last ``scored`` tokens.

    ``plain``: of ``head.plain_head``.
    """
    import torch

    most = LOGIT_BYTES if plain else COSTLY_LOGIT_BYTES
    chunk = max(1, most // (2 * 4 * vocabulary_size(model)))
    logits = logits_at(model, ids_T, plain=plain)
    begin = len(ids_T) - 1 - scored if scored else 0
    parts = []
    with torch.inference_mode():
        for positions_P in torch.split(torch.arange(begin, len(ids_T) - 1), chunk):
            logits_PV = logits(positions_P)
            target_P1 = ids_T[positions_P + 1, None].to(logits_PV.device)
            target_logits_P = logits_PV.gather(1, target_P1)[:, 0]
            parts.append((logits_PV.logsumexp(-1) - target_logits_P).cpu())
    return torch.cat(parts)


def sliding_nll(
    model: PreTrainedModel, ids_T: torch.Tensor, sliding: Sliding, *, first: int | None, plain: bool
) -> torch.Tensor:
    """The same [T - 1] through a sliding window; ``ids_T`` begins with ``first`` where there is one."""
    import torch

    tokens, ahead = len(ids_T), int(first is not None)
    parts = [token_nll(model, ids_T[: sliding.window], plain=plain)]
    for begin in range(sliding.window, tokens, sliding.stride):
        end = min(begin + sliding.stride, tokens)
        start = begin + sliding.stride - sliding.window + ahead
        window_W = torch.cat([ids_T[:ahead], ids_T[start:end]])
        parts.append(token_nll(model, window_W, plain=plain, scored=end - begin))
    return torch.cat(parts)


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Refuses texts that a model with a table of learned positions has no row for.

    Rotary embeddings compute any position, whatever the config says that the model was trained at.

    Raises:
        UserError: with both numbers.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None or tokens <= longest or getattr(config, "rope_parameters", None):
        return
    raise UserError(
        f"{tokens} tokens are more than the model's {longest} positions, which are no rotary embeddings"
    )
